"""What the GPU decides by itself is what the host would have decided, and so are the images.

Runs under the stand-in for NVIDIA's driver, in a process of its own (test_device_runs.py starts it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.block_rules import block_rules
from adacorr_deploy.caching.controllers import PaperController, Run
from adacorr_deploy.caching.decisions import Action, unit_spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PaperGate, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import EngineError, SamplingCancelledError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.plugins.decision_kernels import CASES, REASONS
from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.runtime.denoise import Progress
from adacorr_deploy.runtime.device_decisions import STEPS_AHEAD, sample_decided_on_device
from adacorr_deploy.runtime.planned_run import PlannedRun, planned_run
from tests.runtime.conftest import write_bundle
from tests.runtime.device_engines import DeviceEngines
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import HALVES, UNITS, TinyDiT

pytestmark = pytest.mark.skipif("STAND_IN_DRIVER" not in os.environ, reason="needs the stand-in driver")

STEPS = 12
REQUEST = SampleRequest((0, 2), steps=STEPS, guidance=3.0, seed=7)
FLOORS = (0.9, 1.35, 1.65)  # amid the scores that the tiny DiT's blocks take


@pytest.fixture
def engines(model: TinyDiT, tmp_path: Path) -> Iterator[DeviceEngines]:
    backend = DeviceEngines(model, tmp_path)
    yield backend
    backend.close()


def policy(
    *,
    lazy: bool = True,
    kind: PredictorKind = PredictorKind.HOLD,
    guards: Guards | None = None,
    epsilon: float = 0.1,
) -> Policy:
    return Policy(
        name="decided",
        gate=PaperGate(lazy=lazy, gamma=2.5, epsilon=epsilon),
        predictor=Predictor(kind=kind),
        guards=guards or Guards(warmup_steps=2, final_steps=1, max_age_steps=3),
    )


def floors_of(made: Policy, parts: int) -> tuple[float, ...] | None:
    assert isinstance(made.gate, PaperGate)
    return (FLOORS * parts)[:parts] if made.gate.lazy else None


def controller(made: Policy, parts: int = len(UNITS)) -> PaperController:
    assert isinstance(made.gate, PaperGate)
    run = Run(steps=STEPS, blocks=parts)
    return PaperController(made, made.gate, run, unit_spans(parts), floors_of(made, parts))


def planned(pipeline: Pipeline, made: Policy, request: SampleRequest = REQUEST) -> PlannedRun:
    parts = len(pipeline.manifest.model.units)
    return planned_run(pipeline.manifest, request, controller(made, parts), history=1)


def decided(
    pipeline: Pipeline,
    made: Policy,
    request: SampleRequest = REQUEST,
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> SampleResult:
    parts = len(pipeline.manifest.model.units)
    return sample_decided_on_device(
        pipeline,
        planned(pipeline, made, request),
        block_rules(made, floors_of(made, parts), parts),
        fresh_gates=made.predictor.kind.fresh_gates,
        progress=progress,
        cancelled=cancelled,
    )


def told(pipeline: Pipeline, made: Policy, request: SampleRequest = REQUEST) -> SampleResult:
    """Run the same with the host's decisions."""
    return pipeline.sample(request, controller(made, len(pipeline.manifest.model.units)), history=1)


def check_same(found: SampleResult, expected: SampleResult, *, actions: Sequence[Action]) -> None:
    records = list(expected.trace.records)
    assert {record.action for record in records} == set(actions), "the policy must do what the test is about"
    for mine, theirs in zip(found.trace.records, records, strict=True):
        assert (mine.step, mine.block, mine.branch, mine.action) == (
            theirs.step,
            theirs.block,
            theirs.branch,
            theirs.action,
        )
        assert (mine.reason, mine.age) == (theirs.reason, theirs.age)
        assert (mine.score is None, mine.weight is None) == (theirs.score is None, theirs.weight is None)
        if theirs.score is not None:
            assert mine.score == pytest.approx(theirs.score, rel=1e-3)
            assert mine.weight == pytest.approx(theirs.weight, rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(found.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert found.rho == expected.rho
    assert found.launches == expected.launches == found.trace.launches


@pytest.mark.parametrize(
    ("made", "actions"),
    [
        (policy(), tuple(Action)),
        (policy(kind=PredictorKind.GATED), tuple(Action)),
        (policy(lazy=False), (Action.EVALUATE, Action.CORRECT)),
        (policy(guards=Guards(warmup_steps=4, final_steps=3, max_age_steps=1), epsilon=0.5), tuple(Action)),
        (policy(guards=Guards(protected_blocks=frozenset({1}))), tuple(Action)),
    ],
    ids=["hold", "gated", "never reused", "guards", "protected"],
)
def test_the_gpu_decides_as_the_host_does(
    bundle: Path, model: TinyDiT, engines: DeviceEngines, made: Policy, actions: Sequence[Action]
) -> None:
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        on_cpu = told(pipeline, made)
    with Pipeline.open(bundle, backend=engines) as pipeline:
        by_host = told(pipeline, made)
        for _ in range(2):  # the second time over graphs and slots that were used
            found = decided(pipeline, made)
            check_same(found, on_cpu, actions=actions)
            check_same(found, by_host, actions=actions)
            np.testing.assert_array_equal(found.latents, by_host.latents)


def test_halves_of_blocks_are_decided_one_by_one(tmp_path: Path) -> None:
    model = TinyDiT(units=HALVES)
    backend = DeviceEngines(model, tmp_path)
    with Pipeline.open(write_bundle(tmp_path / "halves", model), backend=backend) as pipeline:
        expected, found = told(pipeline, policy()), decided(pipeline, policy())
        check_same(found, expected, actions=tuple(Action))
        np.testing.assert_array_equal(found.latents, expected.latents)
    backend.close()


def test_requests_of_other_rules_and_sizes_leave_nothing_behind(bundle: Path, engines: DeviceEngines) -> None:
    always = policy(lazy=False)
    alone = SampleRequest((1,), steps=STEPS, guidance=1.0, seed=3, sampler=Sampler.DDPM)
    with Pipeline.open(bundle, backend=engines) as pipeline:
        expected = {made.gate.lazy: told(pipeline, made) for made in (policy(), always)}  # type: ignore[union-attr]
        lonely = told(pipeline, policy(), alone)
        for _ in range(2):
            np.testing.assert_array_equal(decided(pipeline, policy()).latents, expected[True].latents)
            np.testing.assert_array_equal(decided(pipeline, always).latents, expected[False].latents)
            np.testing.assert_array_equal(decided(pipeline, policy(), alone).latents, lonely.latents)
        np.testing.assert_array_equal(told(pipeline, policy()).latents, expected[True].latents)


def test_the_host_waits_once_and_queues_a_graph_for_each_step(bundle: Path, engines: DeviceEngines) -> None:
    with Pipeline.open(bundle, backend=engines) as pipeline:
        for _ in range(2):
            decided(pipeline, policy())
        device = engines.device
        before = device.synchronisations, device.event_waits, device.graph_launches
        decided(pipeline, policy())
        # Two waits for events that have passed: the trace and the counters, read when the latents are.
        assert (device.synchronisations - before[0], device.event_waits - before[1]) == (1, 2)
        assert device.graph_launches - before[2] == STEPS + 1, "and one for the modulation of all steps"


def test_sessions_count_what_ran_also_when_the_request_is_cancelled(bundle: Path, engines: DeviceEngines) -> None:
    made = policy(guards=Guards(warmup_steps=STEPS))  # evaluates everything
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 6

    with Pipeline.open(bundle, backend=engines) as pipeline:
        whole = decided(pipeline, made)
        sessions = [pipeline.session(name) for name in pipeline.manifest.model.block_names]
        before = [session.launches for session in sessions]
        with pytest.raises(SamplingCancelledError, match="Cancelled at step 7 of 12"):
            decided(pipeline, made, cancelled=cancelled)
        assert [session.launches - count for session, count in zip(sessions, before, strict=True)] == [6] * len(UNITS)
        np.testing.assert_array_equal(decided(pipeline, made).latents, whole.latents)


def test_who_watches_sees_finished_steps_and_their_rho(bundle: Path, engines: DeviceEngines) -> None:
    seen: list[tuple[int, int, float]] = []
    queued: list[int] = []

    def note(step: int, steps: int, rho: float) -> None:
        seen.append((step, steps, rho))

    def go_on() -> bool:
        queued.append(len(seen))
        return False

    with Pipeline.open(bundle, backend=engines) as pipeline:
        result = decided(pipeline, policy(), progress=note, cancelled=go_on)
    assert [step for step, _, _ in seen] == list(range(1, STEPS + 1))
    assert seen[-1][2] == pytest.approx(result.rho)
    records = [record.action for record in result.trace.records if record.branch.value == "cond"]
    for step, _, rho in seen:
        assert rho == pytest.approx(records[: step * len(UNITS)].count(Action.REUSE) / (step * len(UNITS)))
    assert queued == [max(0, step - STEPS_AHEAD) for step in range(STEPS)], "the host stays within two steps"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the engines
def test_signals_that_are_not_finite_evaluate_and_the_request_ends_with_the_reason(
    bundle: Path, engines: DeviceEngines
) -> None:
    latents = np.full((2, 1, 4, 4), 3e38, np.float32)  # finite, and beyond it once they are squared
    huge = SampleRequest((0, 2), steps=STEPS, guidance=3.0, seed=7, latents=latents)
    with Pipeline.open(bundle, backend=engines) as pipeline:
        with pytest.raises(EngineError, match="NaN or infinite values after step 12 of 12"):
            decided(pipeline, policy(), huge)
        (space,) = pipeline._workspaces.values()
        records = space.decided_steps[False].trace()()
        undecided = records[2:-1]  # by a guard
        assert {REASONS[reason] for reason in undecided[:, :, 1].ravel().tolist()} == {"signals not finite"}
        assert {CASES[action] for action in records[:, :, 0].ravel().tolist()} == {"evaluate"}
        check_same(decided(pipeline, policy()), told(pipeline, policy()), actions=tuple(Action))


def test_what_did_not_run_as_decided_is_not_taken_for_a_result(
    bundle: Path, engines: DeviceEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a driver would leave it that runs another case than was chosen: here every case notes an evaluation."""
    with Pipeline.open(bundle, backend=engines) as pipeline:
        graphs = engines.decision_graphs()
        note = graphs.note_evaluation

        def twice(**buffers: object) -> DeviceLaunch:
            launch = note(**buffers)  # type: ignore[arg-type]

            def enqueue(stream: object) -> None:
                launch.enqueue(stream)  # type: ignore[arg-type]
                launch.enqueue(stream)  # type: ignore[arg-type]

            return DeviceLaunch(engines.device, "note", enqueue, on_run=lambda: None, keeps=(launch,), own_graph=False)

        monkeypatch.setattr(graphs, "note_evaluation", twice)
        with pytest.raises(EngineError, match=r'the driver did not follow the decisions\. .* decide = "block"'):
            decided(pipeline, policy())


def test_a_policy_file_asks_for_it(bundle: Path, model: TinyDiT, engines: DeviceEngines) -> None:
    made = Policy.model_validate(
        {"name": "mine", "decide": "device", "gate": {"kind": "paper"}, "predictor": {"kind": "hold"}}
    )
    with Pipeline.open(bundle, backend=engines) as pipeline:
        found = sample_with_policy(pipeline, REQUEST, made)
        before = engines.device.synchronisations
        sample_with_policy(pipeline, REQUEST, made)
        assert engines.device.synchronisations - before == 1
        expected = sample_with_policy(pipeline, REQUEST, made.model_copy(update={"decide": None}))
    check_same(found, expected, actions=(Action.EVALUATE, Action.CORRECT))
    with (
        Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline,
        pytest.raises(EngineError, match=r'fake can.t decide on the device: .* decide = "block"'),
    ):
        sample_with_policy(pipeline, REQUEST, made)


def test_a_bundle_without_the_kernels_says_so(bundle: Path, model: TinyDiT, tmp_path: Path) -> None:
    backend = DeviceEngines(model, tmp_path)
    (tmp_path / "decisions.ptx").unlink()
    with Pipeline.open(bundle, backend=backend) as pipeline:
        with pytest.raises(EngineError, match=r"holds no decisions.ptx.* Rebuild it with adacorr-build"):
            decided(pipeline, policy())
        told(pipeline, policy())
    backend.close()
