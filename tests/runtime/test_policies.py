"""Every row of the table of policies, run by the loop on the tiny DiT: what the trace says is what was launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.controllers import Run, controller_for_policy
from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.caching.gates.adacorrection import AdaCorrectionGate, PaperGate
from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult
from adacorr_deploy.runtime import pipeline as pipeline_module
from tests.caching.scripted_calibration import STEPS, calibration
from tests.caching.scripted_profile import profile
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import HALVES, UNITS, WIDTH, TinyDiT

REQUEST = SampleRequest((0, 2), steps=STEPS, guidance=3.0, seed=7)
BASES = [
    name
    for name, policy in PRESETS.items()
    if policy.caches and not isinstance(policy.gate, AdaCorrectionGate | PaperGate)
]
BLENDING = [name for name in BASES if not PRESETS[name].predictor.whole_step]  # an output is not blended
ON_TOP = [f"{name}+adacorrection@2" for name in BASES] + [f"{name}+paper-lazy" for name in BLENDING]


@contextmanager
def tiny(folder: Path, *, halves: bool) -> Iterator[Pipeline]:
    model = TinyDiT(units=HALVES if halves else UNITS)
    with Pipeline.open(write_bundle(folder / "tiny", model), backend=FakeBackend.of(model)) as pipeline:
        yield pipeline


def short(name: str) -> Policy:
    """A policy that fits three parts and a run of twelve steps: no eight first blocks, no warm-up of ten steps."""
    policy = policy_named(name)
    changes: dict[str, object] = {}
    if policy.spans is not None and policy.spans.first > 1:
        changes["spans"] = policy.spans.model_copy(update={"first": 1})
    if policy.guards.warmup_steps > 4:
        changes["guards"] = policy.guards.model_copy(update={"warmup_steps": 2})
    return policy.model_copy(update=changes)


EAGER = {  # of those that go by a measurement: knobs at which they reuse on a model that was not trained
    "smoothcache": 100,
    "teacache": 100,
    "adacache": 1000,
    "fbcache": 100,
    "dbcache": 100,
    "dbprune": 100,
    "easycache": 100,
}


def eager(name: str) -> Policy:
    """A short policy that reuses."""
    return short(f"{name}@{EAGER[name]}" if name in EAGER else name)


def weighed(name: str, mode: str, **equations: float) -> Policy:
    """It with the paper on top."""
    raw = eager(name).model_dump(mode="json", by_alias=True)
    return Policy.model_validate({**raw, "correction": {"mode": mode, **equations}})


def sampled(pipeline: Pipeline, policy: Policy, floor: float = 2.0) -> SampleResult:
    model = pipeline.manifest.model
    steps = policy.sampled_steps(STEPS)
    run = Run(
        steps=steps,
        blocks=len(model.units),
        halves=model.blocks if model.halves else (),
        elements=model.tokens * model.width,
        lags=policy.lags,
    )
    made = calibration(predictor=policy.predictor, spans=policy.spans_of(run), blocks=run.blocks)
    made = made.model_copy(update={"paper_floors": (floor,) * run.blocks})
    controller = controller_for_policy(policy, run, made, profile(steps=steps, parts=run.blocks, width=WIDTH))
    request = SampleRequest(REQUEST.labels, steps=steps, guidance=REQUEST.guidance, seed=REQUEST.seed)
    return pipeline.sample(request, controller, history=policy.history)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", [*PRESETS, *ON_TOP])
def test_a_policy_launches_what_its_trace_says(tmp_path: Path, name: str, halves: bool) -> None:
    with tiny(tmp_path, halves=halves) as pipeline:
        policy = short(name)
        result = sampled(pipeline, policy)
        assert np.isfinite(result.latents).all()
        assert result.launches == result.trace.launches
        parts = len(pipeline.manifest.model.units)
    records = [record for record in result.trace.records if record.branch is result.trace.branches[0]]
    assert len(records) == result.steps * parts
    forced = policy.guards.warmup_steps if policy.caches else 0
    assert all(record.action is Action.EVALUATE for record in records if record.step <= max(0, forced - 1))


@pytest.mark.parametrize("name", ["fora@1", "deepcache@1", "teacache@0", "fbcache@0", "dbprune@0", "easycache@0"])
def test_with_nothing_reused_a_policy_computes_what_none_does(tmp_path: Path, name: str) -> None:
    """Every kept residual, observed input and measured change on the way leaves no trace in the image."""
    with tiny(tmp_path, halves=False) as pipeline:
        found, plain = sampled(pipeline, short(name)), sampled(pipeline, PRESETS["none"])
    assert found.rho == 0.0
    np.testing.assert_array_equal(found.latents, plain.latents)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", BLENDING)
def test_the_paper_with_a_weight_of_one_computes_what_none_does(tmp_path: Path, name: str, halves: bool) -> None:
    """Whatever the base keeps, a correction blends with the fresh output and nothing of it is lost or kept blended."""
    with tiny(tmp_path, halves=halves) as pipeline:
        policy = weighed(name, "paper-exact", gamma=100.0)
        found, plain = sampled(pipeline, policy), sampled(pipeline, PRESETS["none"])
    corrected = [record for record in found.trace.records if record.action is Action.CORRECT]
    assert corrected
    assert {record.weight for record in corrected} == {1.0}
    assert (found.rho, found.launches) == (0.0, found.trace.launches)
    np.testing.assert_array_equal(found.latents, plain.latents)


@pytest.mark.parametrize("name", BLENDING)
def test_the_paper_with_a_weight_of_nought_is_the_base(tmp_path: Path, name: str) -> None:
    with tiny(tmp_path, halves=False) as pipeline:
        found, base = sampled(pipeline, weighed(name, "paper-lazy"), floor=1e9), sampled(pipeline, eager(name))
    assert found.rho == base.rho > 0
    assert {record.weight for record in found.trace.records if record.action is Action.REUSE} == {0.0}
    np.testing.assert_array_equal(found.latents, base.latents)


def test_between_the_two_the_paper_blends_with_what_the_base_would_reuse(tmp_path: Path) -> None:
    """γ small: the image lies between the base's and the uncached one, and every block is launched."""
    with tiny(tmp_path, halves=False) as pipeline:
        plain, base = sampled(pipeline, PRESETS["none"]).latents, sampled(pipeline, short("fora")).latents
        off = [
            float(np.abs(sampled(pipeline, weighed("fora", "paper-exact", gamma=gamma)).latents - plain).mean())
            for gamma in (1e-6, 0.1, 100.0)
        ]
    assert off[0] > off[1] > off[2] == 0.0
    assert off[0] <= float(np.abs(base - plain).mean()) * 1.01


@pytest.mark.parametrize("halves", [False, True])
def test_no_policy_leaves_anything_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halves: bool
) -> None:
    """All of them in one pipeline that keeps every workspace, there and back, against a pipeline for each."""
    monkeypatch.setattr(pipeline_module, "WORKSPACES_KEPT", 100)
    names = [*PRESETS, *ON_TOP]
    with tiny(tmp_path, halves=halves) as pipeline:
        found = {name: [sampled(pipeline, short(name))] for name in names}
        for name in reversed(names):
            found[name].append(sampled(pipeline, short(name)))
        assert len(pipeline._workspaces) < len(names)
    for name, results in found.items():
        with tiny(tmp_path / name, halves=halves) as pipeline:
            alone = sampled(pipeline, short(name))
        for result in results:
            np.testing.assert_array_equal(result.latents, alone.latents, err_msg=name)
            assert result.trace.to_json() == alone.trace.to_json(), name
