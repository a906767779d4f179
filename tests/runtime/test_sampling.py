"""A policy runs with the calibration that was made for this very run, or says which command makes it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.calibration import MAX_MEASURE, Calibration
from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, Policy, policy_named
from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.core.bundle import store_in_bundle
from adacorr_deploy.core.errors import BundleError, CalibrationError, PolicyError, RequestError, SamplingCancelledError
from adacorr_deploy.core.manifest import MANIFEST_NAME
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.runtime import Pipeline, SampleRequest, controller_for_request, sample_with_policy
from adacorr_deploy.runtime.measurements import calibrations
from adacorr_deploy.runtime.sampling import calibration_key
from tests.caching.scripted_calibration import STEPS, calibration
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT

REQUEST = SampleRequest((0, 2), steps=STEPS, guidance=4.0, seed=7)
FULL = STEPS * 3  # block launches without caching
OUTPUT = PRESETS[DEFAULT_POLICY].predictor
CALIBRATED = ("robust", "robust-blocks", "scheduled", "scheduled-blocks", "paper-lazy")


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "own"))


@pytest.fixture
def own_pipeline(own_bundle: Path, backend: FakeBackend) -> Iterator[Pipeline]:
    with Pipeline.open(own_bundle, backend=backend) as opened:
        yield opened


def for_pipeline(pipeline: Pipeline, predictor: Predictor, **key: object) -> Calibration:
    """A calibration of this bundle's three block parts that forbids nothing by its offsets."""
    key = {**calibration_key(pipeline.bundle, REQUEST).model_dump(), **key}
    made = calibration(predictor=predictor).model_dump()
    limits = tuple((MAX_MEASURE,) * 3 for _ in range(STEPS))
    return Calibration.model_validate({**made, "key": key, "offset_limits": limits, "paper_floors": (1e9,) * 3})


def store(pipeline: Pipeline, made: Calibration) -> Path:
    """Store a calibration as the commands do, and return where it is."""
    content = made.model_dump_json().encode()
    pipeline.bundle, stored = store_in_bundle(pipeline.bundle, f"calibration/{made.file_name}", content)
    return stored


def refusal(pipeline: Pipeline, request: SampleRequest, policy: Policy) -> str:
    with pytest.raises(CalibrationError) as caught:
        sample_with_policy(pipeline, request, policy)
    return str(caught.value)


@pytest.mark.parametrize("name", CALIBRATED)
def test_without_a_calibration_the_command_that_makes_it_is_given(
    own_pipeline: Pipeline, backend: FakeBackend, name: str
) -> None:
    message = refusal(own_pipeline, REQUEST, PRESETS[name])
    assert f"policy {name} needs a calibration; the bundle holds none." in message
    assert f"adacorr-calibrate {own_pipeline.bundle.path} --sampler ddim --steps 12 --guidance 4" in message
    predictor = PRESETS[name].predictor
    asked = f"--predictor {predictor.kind.value} --order {predictor.order}"
    assert (asked in message) == (name != "paper-lazy")  # whose floors hold for any predictor
    assert backend.order == []


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"steps": 11}, "steps is 12, the run's is 11"),
        ({"guidance": 3.5}, "guidance is 4.0, the run's is 3.5"),
        ({"sampler": Sampler.DDPM}, "sampler is ddpm, whose noise none can follow. Calibrated policies work with"),
    ],
    ids=["steps", "guidance", "sampler"],
)
def test_a_calibration_for_another_run_is_refused_by_what_differs(
    own_pipeline: Pipeline, changed: dict[str, object], difference: str
) -> None:
    store(own_pipeline, for_pipeline(own_pipeline, OUTPUT))
    request = replace(REQUEST, **changed)  # type: ignore[arg-type]
    assert difference in refusal(own_pipeline, request, PRESETS["robust"])


@pytest.mark.parametrize(
    ("changed", "told"), [({"sampler": Sampler.DDPM}, "sampler ddpm"), ({"eta": 0.5}, "sampler ddim with eta 0.5")]
)
def test_noise_that_a_revision_would_draw_again_is_refused_before_the_work_starts(
    own_pipeline: Pipeline, changed: dict[str, object], told: str
) -> None:
    request = replace(REQUEST, **changed)  # type: ignore[arg-type]
    controller_for_request(own_pipeline, request, policy_named("fora"))
    with pytest.raises(PolicyError, match=f"{told} adds noise, .* a sampler that adds none: ddim or dpmpp-2m"):
        controller_for_request(own_pipeline, request, policy_named("fora+revised"))


def test_a_calibration_of_another_checkpoint_is_refused(own_pipeline: Pipeline) -> None:
    store(own_pipeline, for_pipeline(own_pipeline, OUTPUT, checkpoint_sha256="1" * 64))
    assert "checkpoint_sha256 is 111" in refusal(own_pipeline, REQUEST, PRESETS["robust"])


def test_a_calibration_of_another_predictor_is_refused(own_pipeline: Pipeline) -> None:
    store(own_pipeline, for_pipeline(own_pipeline, Predictor()))
    message = refusal(own_pipeline, REQUEST, PRESETS["robust"])
    assert "the bundle's are for predictor gated-taylor-1, not output-taylor-1-quadratic" in message
    assert "--predictor output-taylor --order 1 --revision quadratic, or" in message


@pytest.mark.parametrize("name", CALIBRATED)
def test_with_its_calibration_a_policy_launches_what_its_trace_says_and_less_than_all(
    own_pipeline: Pipeline, backend: FakeBackend, name: str
) -> None:
    for predictor in (Predictor(), OUTPUT):  # side by side: each policy must find its own
        store(own_pipeline, for_pipeline(own_pipeline, predictor))
    result = sample_with_policy(own_pipeline, REQUEST, PRESETS[name])
    launched = sum(part.startswith("block_") for part in backend.order)
    assert result.launches == result.trace.launches == launched < FULL
    assert result.rho == pytest.approx(1 - launched / FULL)
    exact = sample_with_policy(own_pipeline, REQUEST, PRESETS["none"]).latents
    assert not np.array_equal(result.latents, exact)


def test_a_schedule_evaluates_exactly_as_many_steps_as_its_target_allows(own_pipeline: Pipeline) -> None:
    store(own_pipeline, for_pipeline(own_pipeline, OUTPUT))
    for target in ("1", "1.5", "2"):
        result = sample_with_policy(own_pipeline, REQUEST, policy_named(f"scheduled@{target}"))
        assert result.launches <= 3 * int(STEPS / float(target))


def test_a_replaced_calibration_is_read_anew(own_pipeline: Pipeline, own_bundle: Path, backend: FakeBackend) -> None:
    """Files are parsed once per content: a service that calibrates again must not go on with what it read before."""
    before = for_pipeline(own_pipeline, OUTPUT)
    store(own_pipeline, before)
    assert sample_with_policy(own_pipeline, REQUEST, PRESETS["robust"]).launches < FULL
    never = tuple((("inf",) * 3,) * 3 for _ in range(STEPS))
    after = Calibration.model_validate({**before.model_dump(), "skip_costs": never})
    store(own_pipeline, after)
    assert list(calibrations(own_pipeline.bundle).values()) == [after]
    assert sample_with_policy(own_pipeline, REQUEST, PRESETS["robust"]).launches == FULL
    with Pipeline.open(own_bundle, backend=backend) as again:
        assert list(calibrations(again.bundle).values()) == [after]


def test_a_calibration_that_is_not_listed_is_not_read(
    own_pipeline: Pipeline, own_bundle: Path, backend: FakeBackend
) -> None:
    """A killed adacorr-calibrate leaves one."""
    before = (own_bundle / MANIFEST_NAME).read_bytes()
    left = store(own_pipeline, for_pipeline(own_pipeline, OUTPUT))
    (own_bundle / MANIFEST_NAME).write_bytes(before)
    (left.parent / "half.json").write_bytes(b'{"ke')
    with Pipeline.open(own_bundle, backend=backend) as again:
        assert "the bundle holds none" in refusal(again, REQUEST, PRESETS["robust"])


def test_guidances_that_look_alike_have_calibrations_of_their_own(own_pipeline: Pipeline) -> None:
    guidances = (4.0, 4.0000001, 4.000000000000001)
    for guidance in guidances:
        store(own_pipeline, for_pipeline(own_pipeline, OUTPUT, guidance=guidance))
    assert [found.key.guidance for found in calibrations(own_pipeline.bundle).values()] == [*guidances]
    for guidance in guidances:
        request = replace(REQUEST, guidance=guidance)
        assert sample_with_policy(own_pipeline, request, PRESETS["robust"]).launches < FULL


def test_a_calibration_that_has_gone_is_named(own_pipeline: Pipeline, own_bundle: Path) -> None:
    gone = store(own_pipeline, for_pipeline(own_pipeline, OUTPUT, guidance=4.25))
    gone.unlink()
    with pytest.raises(BundleError, match=rf"{gone} can't be read any more: .* Open the bundle again"):
        sample_with_policy(own_pipeline, REQUEST, PRESETS["robust"])


def test_a_calibration_file_that_is_none_is_named_to_those_who_need_one(
    own_pipeline: Pipeline, own_bundle: Path, backend: FakeBackend
) -> None:
    store_in_bundle(own_pipeline.bundle, "calibration/bad.json", b'{"steps": 3}')
    with Pipeline.open(own_bundle, backend=backend) as again:
        with pytest.raises(CalibrationError, match=r"calibration/bad-\w{12}.json: .*adacorr-calibrate"):
            sample_with_policy(again, REQUEST, PRESETS["robust"])
        for name in ("none", "fora", "fewer-steps"):
            assert sample_with_policy(again, REQUEST, PRESETS[name]).launches > 0


def test_fewer_steps_takes_the_sampler_there_in_fewer_steps_and_none_takes_all(own_pipeline: Pipeline) -> None:
    fewer = sample_with_policy(own_pipeline, REQUEST, policy_named("fewer-steps@3"))
    assert (fewer.steps, fewer.launches) == (4, 12)
    assert fewer.rho == pytest.approx(1 - 4 / 12)  # of the 12 steps that were asked for
    asked = sample_with_policy(own_pipeline, replace(REQUEST, steps=4), PRESETS["none"])
    np.testing.assert_array_equal(fewer.latents, asked.latents)


def test_nothing_is_kept_for_policies_that_reuse_nothing(own_pipeline: Pipeline, backend: FakeBackend) -> None:
    def allocated(policy: Policy) -> int:
        before = len(backend.buffers)
        sample_with_policy(own_pipeline, REQUEST, policy)
        return sum(buffer.values.nbytes for buffer in backend.buffers[before:])

    assert allocated(PRESETS["none"]) < allocated(PRESETS["fora"])


def test_controllers_are_made_anew_for_each_request(own_pipeline: Pipeline) -> None:
    store(own_pipeline, for_pipeline(own_pipeline, OUTPUT))
    first, second = (controller_for_request(own_pipeline, REQUEST, PRESETS["robust"]) for _ in range(2))
    assert first is not second
    runs = [sample_with_policy(own_pipeline, REQUEST, PRESETS["robust"]) for _ in range(2)]
    assert list(runs[0].trace.records) == list(runs[1].trace.records)
    assert any(record.action is Action.REUSE for record in runs[0].trace.records)


def test_progress_and_cancellation_reach_the_loop(own_pipeline: Pipeline) -> None:
    told: list[tuple[int, int]] = []
    sample_with_policy(
        own_pipeline, REQUEST, PRESETS["fora"], progress=lambda step, steps, rho: told.append((step, steps))
    )
    assert told == [(step, STEPS) for step in range(1, STEPS + 1)]
    with pytest.raises(SamplingCancelledError):
        sample_with_policy(own_pipeline, REQUEST, PRESETS["fora"], cancelled=lambda: True)


def test_an_observer_sees_the_latents_of_every_step_and_changes_none(own_pipeline: Pipeline) -> None:
    """Copies, of both of the buffers that take turns, up to those that the run returns."""
    seen: list[np.ndarray] = []
    fora = PRESETS["fora"]
    result = sample_with_policy(own_pipeline, REQUEST, fora, on_latents=lambda step, latents: seen.append(latents))
    assert len(seen) == STEPS
    assert all(not np.array_equal(before, after) for before, after in itertools.pairwise(seen))
    np.testing.assert_array_equal(seen[-1], result.latents)
    np.testing.assert_array_equal(sample_with_policy(own_pipeline, REQUEST, fora).latents, result.latents)


def test_the_request_is_checked_as_asked_not_as_shortened(own_pipeline: Pipeline, model: TinyDiT) -> None:
    """`fewer-steps` would bring a number of steps beyond the schedule into its range."""
    with pytest.raises(RequestError, match="steps is 150"):
        sample_with_policy(own_pipeline, replace(REQUEST, steps=150), policy_named("fewer-steps@2"))
    with pytest.raises(RequestError, match=f"label is {model.spec.num_classes}"):
        sample_with_policy(own_pipeline, replace(REQUEST, labels=(model.spec.num_classes,)), PRESETS["robust"])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("skip_costs", [[[1e308] * 3] * 3] * STEPS, "skip_costs.0.0.0: allowed are"),
        ("probe.expected", [[[math.inf] * 3] * 3] * STEPS, "probe.expected.0.0.0: allowed are"),
        ("probe.expected", [[[1e-320] * 3] * 3] * STEPS, "probe.expected.0.0.0: allowed are"),
        ("probe.block", 50, "probe.block is 50"),
        ("offset_limits", [], "offset_limits has 0 steps"),
        ("paper_floors", [1.0], "paper_floors holds 1 numbers, allowed are 3: one for each block part"),
    ],
)
@pytest.mark.parametrize("name", ["robust", "scheduled", "paper-lazy"])
def test_a_listed_calibration_with_values_that_none_has_is_refused_before_sampling(
    own_pipeline: Pipeline, backend: FakeBackend, name: str, path: str, value: object, said: str
) -> None:
    """Its hash is right: whoever made the bundle, or the disk, is not to be trusted."""
    made = for_pipeline(own_pipeline, OUTPUT)
    raw = json.loads(made.model_dump_json())
    *outer, last = path.split(".")
    (raw[outer[0]] if outer else raw)[last] = value
    own_pipeline.bundle, _ = store_in_bundle(own_pipeline.bundle, "calibration/bad.json", json.dumps(raw).encode())
    message = refusal(own_pipeline, REQUEST, PRESETS[name])
    assert "calibration/bad" in message
    assert said in message
    command = "--sampler ddim --steps 12 --guidance 4 --predictor output-taylor --order 1 --revision quadratic"
    assert message.endswith(f"Make it again with: adacorr-calibrate {own_pipeline.bundle.path} {command}")
    assert backend.order == []


def test_a_calibration_file_that_is_too_large_is_refused(own_pipeline: Pipeline) -> None:
    own_pipeline.bundle, _ = store_in_bundle(own_pipeline.bundle, "calibration/big.json", b" " * (16 << 20) + b"{}")
    message = refusal(own_pipeline, REQUEST, PRESETS["robust"])
    assert re.search("calibration/big.*: it is larger than 16777216 bytes.* adacorr-calibrate /", message)


def test_a_protected_block_that_the_bundle_does_not_have_is_refused(own_pipeline: Pipeline) -> None:
    """It would protect nothing, and nobody would notice."""
    base = PRESETS["fora"]
    guards = base.guards.model_copy(update={"protected_blocks": frozenset({0, 2})})
    assert sample_with_policy(own_pipeline, REQUEST, base.model_copy(update={"guards": guards})).launches < FULL
    guards = base.guards.model_copy(update={"protected_blocks": frozenset({0, 3})})
    with pytest.raises(PolicyError, match=r"policy fora: guards.protected_blocks holds 3, allowed are 0 … 2"):
        sample_with_policy(own_pipeline, REQUEST, base.model_copy(update={"guards": guards}))
