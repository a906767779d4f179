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
from tests.caching.scripted_calibration import STEPS, calibration
from tests.caching.scripted_profile import profile
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import HALVES, UNITS, WIDTH, TinyDiT

REQUEST = SampleRequest((0, 2), steps=STEPS, guidance=3.0, seed=7)
ON_TOP = [
    f"{name}+adacorrection@2"
    for name, policy in PRESETS.items()
    if policy.caches and not isinstance(policy.gate, AdaCorrectionGate | PaperGate)
]


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


def sampled(pipeline: Pipeline, policy: Policy) -> SampleResult:
    model = pipeline.manifest.model
    steps = policy.sampled_steps(STEPS)
    run = Run(
        steps=steps, blocks=len(model.units), halves=model.halves, elements=model.tokens * model.width, lags=policy.lags
    )
    made = calibration(predictor=policy.predictor, spans=policy.spans_of(run), blocks=run.blocks)
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
