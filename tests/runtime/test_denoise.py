"""The loop does what the method says, no more and no less, and none of the released code's faults."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.core.errors import EngineError, PolicyError
from adacorr_deploy.core.samplers import Sampler, allowed_samplers
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.denoise import typical_error
from adacorr_deploy.runtime.observer import signals_of_branches
from adacorr_deploy.runtime.planned_run import planned_run
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import PlainRun, Script, always, f32
from tests.runtime.tiny_dit import SCHEDULE, TinyDiT, signals

RTOL, ATOL = 1e-5, 1e-6  # float32; the same formulas in another order of memory
REQUEST = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7)


def every(period: int, otherwise: Action = Action.REUSE) -> Script:
    return Script(choose=lambda step, block: Action.EVALUATE if step % period == 0 else otherwise)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", allowed_samplers(SCHEDULE))
def test_policy_none_is_the_plain_chain_bit_for_bit(
    pipeline: Pipeline, model: TinyDiT, sampler: Sampler, guidance: float
) -> None:
    request = SampleRequest((0, 2, 1), steps=5, guidance=guidance, seed=3, sampler=sampler)
    for history in (0, 1):
        result = pipeline.sample(request, Script(), history=history)
        np.testing.assert_array_equal(result.latents, PlainRun(model, request, Script(), 1).latents())
        assert (result.rho, result.launches) == (0.0, 5 * 3)


def test_a_reused_block_is_not_launched(pipeline: Pipeline, backend: FakeBackend) -> None:
    """Upstream evaluates every block at every step and then blends: no work is saved."""
    result = pipeline.sample(REQUEST, every(3), history=1)
    launched = [part for part in backend.order if part.startswith("block_")]
    evaluated = [record for record in result.trace.records if record.action is not Action.REUSE]
    assert launched == [record.block for record in evaluated if record.branch == "cond"]
    assert result.launches == len(launched) == result.trace.launches == 2 * 3
    assert result.rho == pytest.approx(1 - len(launched) / (6 * 3))
    assert sum(part.startswith("predict_") for part in backend.order) == 4 * 3


ACTIONS = st.lists(st.sampled_from(list(Action)), min_size=18, max_size=18)
COEFFICIENTS = st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=3)


@given(
    actions=ACTIONS,
    coefficients=COEFFICIENTS,
    history=st.integers(1, 3),
    present_gates=st.booleans(),
    weight=st.sampled_from([0.0, 0.25, 1.0]),
    measures=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rings_and_launches_compute_what_plain_lists_do(
    bundle: Path,
    model: TinyDiT,
    actions: list[Action],
    coefficients: list[float],
    history: int,
    present_gates: bool,
    weight: float,
    measures: bool,
) -> None:
    script = Script(
        choose=lambda step, block: actions[step * 3 + block],
        coefficients=tuple(coefficients[:history]),
        present_gates=present_gates,
        weight=weight,
        measures=measures,
        wants_signals=measures,
    )
    plain = PlainRun(model, REQUEST, script, history)
    expected = plain.latents()
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        got = pipeline.sample(REQUEST, script, history=history).latents
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
    for (step, block), error in script.errors.items():
        rows = signals({"tokens": plain.predicted[step, block], "reference": plain.outputs[step, block]})
        offsets = (
            np.asarray(rows["signals"])[:, 0].reshape(-1, REQUEST.batch).max(axis=0)
        )  # the worse branch of each image
        typical = float(np.exp(np.log(np.maximum(offsets, 1e-6)).mean()))
        assert error == pytest.approx(typical, rel=1e-3, abs=1e-5)


def test_signals_compare_with_the_input_of_the_last_evaluation(pipeline: Pipeline, model: TinyDiT) -> None:
    """Upstream overwrites the reference before the score is taken, and compares with step t − 1 instead."""
    script = every(4)
    script.wants_signals = True
    pipeline.sample(REQUEST, script, history=2)
    plain = PlainRun(model, REQUEST, script, 2)
    plain.latents()
    assert script.signals.keys() == {(step, block) for step in range(1, 6) for block in range(3)}
    for key, measured in script.signals.items():
        step, block = key
        rows = signals({"tokens": plain.inputs[key], "reference": plain.inputs[0 if step <= 4 else 4, block]})
        for branch, expected in zip(measured, signals_of_branches(rows["signals"], 2), strict=True):
            assert branch.relative_offset > 0.0
            assert branch.relative_offset == pytest.approx(expected.relative_offset, rel=1e-4)
            assert branch.paper_temporal == pytest.approx(expected.paper_temporal, rel=1e-4)


def test_the_blended_value_never_enters_the_cache(pipeline: Pipeline, model: TinyDiT) -> None:
    """Upstream caches it, so that errors compound. Ours holds the fresh units of the corrected step."""
    actions = [Action.EVALUATE, Action.CORRECT, Action.REUSE]
    script = Script(choose=lambda step, block: actions[step], weight=0.3)
    request = SampleRequest((1,), steps=3, seed=1)
    plain = PlainRun(model, request, script, 1)
    expected = plain.latents()
    np.testing.assert_allclose(pipeline.sample(request, script, history=1).latents, expected, rtol=RTOL, atol=ATOL)
    # The reuse at step 2 adds to its input the residual of the fresh evaluation at step 1, not of the blend.
    fresh = Script(choose=lambda step, block: actions[step], weight=1.0)
    recomputed = PlainRun(model, request, fresh, 1)
    recomputed.latents()
    key = (2, 0)  # the first block: its input at step 1 does not depend on the weight
    assert not np.allclose(plain.inputs[key], recomputed.inputs[key])
    np.testing.assert_allclose(
        plain.predicted[key] - plain.inputs[key], recomputed.predicted[key] - recomputed.inputs[key], atol=1e-6
    )


@pytest.mark.parametrize("weight", [1.0, math.nan])
def test_a_full_or_undefined_correction_is_an_evaluation(pipeline: Pipeline, weight: float) -> None:
    script = every(2, otherwise=Action.CORRECT)
    script.weight = weight
    corrected = pipeline.sample(REQUEST, script, history=1)
    np.testing.assert_array_equal(corrected.latents, pipeline.sample(REQUEST, Script(), history=1).latents)
    assert corrected.rho == 0.0


def test_errors_are_measured_where_a_filled_slot_is_evaluated(pipeline: Pipeline, backend: FakeBackend) -> None:
    script = every(3)
    script.measures = True
    result = pipeline.sample(REQUEST, script, history=2)
    assert script.errors.keys() == {(3, block) for block in range(3)}
    assert all(error > 0 for error in script.errors.values())
    unmeasured = pipeline.sample(REQUEST, every(3), history=2)
    np.testing.assert_array_equal(result.latents, unmeasured.latents)


def test_no_reference_is_kept_for_a_policy_that_wants_none(pipeline: Pipeline, backend: FakeBackend) -> None:
    pipeline.sample(REQUEST, Script(references=False), history=1)
    before = len(backend.buffers)
    pipeline.sample(REQUEST, Script(references=True), history=1)
    pipeline.sample(REQUEST, Script(references=True), history=1)
    assert len(backend.buffers) == before + 3  # one per block, once


@pytest.mark.parametrize(
    ("script", "history", "message"),
    [
        (Script(choose=always(Action.REUSE), coefficients=()), 1, "predicts from 0 evaluations"),
        (Script(choose=always(Action.CORRECT), references=False), 1, "keeps no reference"),
        (Script(choose=always(Action.CORRECT), weight=None), 1, "without a score"),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_asks_for_the_impossible_is_refused(
    pipeline: Pipeline, script: Script, history: int, message: str
) -> None:
    with pytest.raises((PolicyError, EngineError), match=message):
        pipeline.sample(REQUEST, script, history=history)


def test_a_bundle_without_the_service_part_says_which(pipeline: Pipeline, backend: FakeBackend) -> None:
    del pipeline._sessions["signals"]  # as in a bundle built without it
    with pytest.raises(EngineError, match="no part signals"):
        pipeline.sample(REQUEST, Script(wants_signals=True), history=1)


def test_latents_that_are_not_finite_name_the_step(bundle: Path, model: TinyDiT) -> None:
    backend = FakeBackend.of(model)
    head = backend.functions["head"]
    backend.functions = {
        **backend.functions,
        "head": lambda tensors: {
            name: f32(values) * np.float32(np.nan if tensors["step"][0] == 2 else 1)
            for name, values in head(tensors).items()
        },
    }
    with Pipeline.open(bundle, backend=backend) as pipeline:
        with pytest.raises(EngineError, match="after step 6 of 6"):  # seen at the end
            pipeline.sample(REQUEST, Script(), history=1)
        with pytest.raises(EngineError, match="after step 4 of 6"):  # seen by the first score that follows
            pipeline.sample(REQUEST, Script(wants_signals=True), history=1)


def test_progress_reports_finished_steps_and_the_share_skipped(pipeline: Pipeline) -> None:
    reports: list[tuple[int, int, float]] = []
    result = pipeline.sample(
        REQUEST, every(2), history=1, progress=lambda step, steps, rho: reports.append((step, steps, rho))
    )
    assert [report[:2] for report in reports] == [(step, 6) for step in range(1, 7)]
    assert [report[2] for report in reports] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2, 2 / 5, 1 / 2])
    assert reports[-1][2] == result.rho


@pytest.mark.parametrize("whole_steps", [False, True])
def test_the_loop_asks_for_every_launch_of_a_block_and_makes_none_itself(
    pipeline: Pipeline, backend: FakeBackend, whole_steps: bool
) -> None:
    script = Script(choose=every(3).choose, whole_steps=whole_steps, references=not whole_steps)
    run = planned_run(pipeline.manifest, REQUEST, script, history=1)
    with pipeline.lease(run.size, references=run.references) as (space, slots):
        denoiser = run.start(space, slots, progress=None, cancelled=None)
        for work in denoiser.works():
            before = len(backend.order)
            work.run()
            asked = [f"block_{block:02d}" for block in range(work.first, work.first + len(work.slots))]
            assert backend.order[before:] == asked
        latents = denoiser.final_latents()
    launched = sum(part.startswith("block_") for part in backend.order)
    assert launched == denoiser.trace.launches == 2 * 3
    np.testing.assert_array_equal(latents, pipeline.sample(REQUEST, script, history=1).latents)


def test_branches_are_summed_up_apart_and_nan_is_never_lost() -> None:
    rows = f32(np.asarray([[3, 1, 2, 1, 1], [4, 5, 4, 3, 1], [1, 2, 3, 4, 5], [1, math.nan, 3, math.nan, 5]]))
    means = f32(np.asarray([[1, 2, 3, 4], [3, 6, 9, 12], [5, 5, 5, 5], [math.inf, 5, 5, 5]]))
    rows = np.concatenate([rows, means], axis=1)
    cond, uncond = signals_of_branches(rows, 2)
    assert (cond.change_l1, cond.reference_l1, cond.change_square, cond.reference_square) == (2, 4, 6, 8)
    assert math.isinf(uncond.change_l1)
    assert cond.relative_offset == pytest.approx(math.sqrt(12.5))
    assert (cond.relative_offset_p95, cond.spatial_change, cond.paper_temporal) == (5.0, 3.0, 2.0)
    assert math.isnan(uncond.relative_offset_p95)
    assert math.isnan(uncond.paper_temporal)
    assert uncond.relative_offset == 1.0
    reversed_cond, _ = signals_of_branches(rows[[3, 2, 0, 1]], 2)
    assert math.isnan(reversed_cond.relative_offset_p95)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_of_equal_images_is_as_hard_as_one(batch: int) -> None:
    assert typical_error([0.3] * batch + [0.7] * batch, batch) == pytest.approx(0.7)


def test_one_wild_image_does_not_decide_for_a_batch_and_a_nan_is_not_lost() -> None:
    assert typical_error([0.1, 0.1, 0.1, 100.0], 4) < 1.0
    assert math.isnan(typical_error([0.1, math.nan, 0.1, 0.1], 2))
