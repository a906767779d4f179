"""Decisions over whole steps: the model's output stands in for every block, and nothing else of the loop changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.samplers import Sampler, sampler_table
from adacorr_deploy.plugins import oracle
from adacorr_deploy.runtime import Pipeline, SampleRequest
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import PlainRun, Script, always
from tests.runtime.tiny_dit import SCHEDULE, TinyDiT

REQUEST = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7)
BLOCKS = 3


def every(period: int, **options: bool) -> Script:
    script = Script(choose=lambda step, block: Action.EVALUATE if step % period == 0 else Action.REUSE, **options)  # type: ignore[arg-type]
    script.whole_steps = True
    return script


def test_evaluating_every_step_is_the_plain_chain_bit_for_bit(pipeline: Pipeline, model: TinyDiT) -> None:
    result = pipeline.sample(REQUEST, every(1), history=2)
    np.testing.assert_array_equal(result.latents, PlainRun(model, REQUEST, Script(), 1).latents())


def test_a_multistep_sampler_is_the_plain_chain_too(pipeline: Pipeline, model: TinyDiT) -> None:
    request = replace(REQUEST, sampler=Sampler.DPMPP_2M)
    expected = PlainRun(model, request, Script(), 1).latents()
    np.testing.assert_array_equal(pipeline.sample(request, every(1), history=2).latents, expected)
    np.testing.assert_array_equal(pipeline.sample(request, Script(), history=0).latents, expected)


def test_a_multistep_sampler_carries_nothing_from_the_request_before(pipeline: Pipeline) -> None:
    request = replace(REQUEST, sampler=Sampler.DPMPP_2M)
    first = pipeline.sample(request, every(2), history=1).latents
    space = next(iter(pipeline._workspaces.values()))
    for buffer in space.image.carried:
        buffer.write(np.full(buffer.shape, np.nan, np.float32))
    np.testing.assert_array_equal(pipeline.sample(request, every(2), history=1).latents, first)


def test_to_a_multistep_sampler_a_held_output_is_that_steps_output(pipeline: Pipeline) -> None:
    """The reused steps estimate the image from the held output, and what they carry is that estimate."""
    request = replace(REQUEST, sampler=Sampler.DPMPP_2M)
    rows = sampler_table(SCHEDULE, Sampler.DPMPP_2M, 6).coefficients.astype(np.float64)
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows.tolist()]
    seen: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    pipeline.sample(request, every(99), history=1)
    space = next(iter(pipeline._workspaces.values()))
    pipeline.sample(
        request, every(99), history=1, progress=lambda step, steps, rho: seen.append(space.read_latents(step - 1))
    )
    latents = np.stack([oracle.philox_normals(7, image, 0, 16).reshape(1, 4, 4) for image in range(2)])
    latents = latents.astype(np.float64)
    output = (seen[0] - table[0]["latents"] * latents) / table[0]["output"]
    carried = np.zeros_like(latents)
    for row, found in zip(table, seen, strict=True):
        after = row["latents"] * latents + row["output"] * output + row["carried"] * carried
        carried = row["carried_of_latents"] * latents + row["carried_of_output"] * output
        np.testing.assert_allclose(found, after, rtol=1e-3, atol=1e-3)
        latents = after


def test_a_reused_step_launches_no_block_and_no_head(pipeline: Pipeline, backend: FakeBackend) -> None:
    result = pipeline.sample(REQUEST, every(3), history=1)
    assert result.launches == result.trace.launches == 2 * BLOCKS
    assert sum(part == "head" for part in backend.order) == 2
    assert sum(part == "extrapolate_1" for part in backend.order) == 4
    assert result.rho == pytest.approx(4 / 6)


def test_a_held_output_moves_the_latents_by_the_sampler_alone(pipeline: Pipeline) -> None:
    """With one evaluation, the latents are a linear function of the first output: recovered here from step 1."""
    first = pipeline.sample(REQUEST, every(99), history=1).latents
    table = sampler_table(SCHEDULE, Sampler.DDIM, 6).coefficients.astype(np.float64)
    one = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7)
    seen: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
    space = next(iter(pipeline._workspaces.values()))

    def remember(step: int, steps: int, rho: float) -> None:
        seen.append(space.read_latents(step - 1))

    pipeline.sample(one, every(99), history=1, progress=remember)
    kept, moved = (table[:, COLUMNS.index(name)] for name in ("latents", "output"))
    start = oracle.philox_normals(7, 0, 0, seen[0][0].size).reshape(seen[0].shape[1:]).astype(np.float64)
    output = (seen[0][0] - kept[0] * start) / moved[0]
    latents = seen[0][0].astype(np.float64)
    for step in range(1, 6):
        latents = kept[step] * latents + moved[step] * output
    np.testing.assert_allclose(first[0], latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_the_measured_error_compares_the_prediction_with_the_fresh_output(pipeline: Pipeline, history: int) -> None:
    script = every(1)
    script.measures = True
    script.coefficients = (0.0,) * history  # predicts zeros: the relative error is 1 whatever the output
    pipeline.sample(REQUEST, script, history=history)
    assert sorted(step for step, _ in script.errors) == [1, 2, 3, 4, 5]
    assert list(script.errors.values()) == pytest.approx([1.0] * 5, abs=1e-3)


def test_measuring_changes_nothing(pipeline: Pipeline) -> None:
    measuring, plain = every(2), every(2)
    measuring.measures = True
    one = pipeline.sample(REQUEST, measuring, history=2).latents
    np.testing.assert_array_equal(one, pipeline.sample(REQUEST, plain, history=2).latents)


def test_nothing_of_a_request_is_left_for_the_next(pipeline: Pipeline) -> None:
    script = every(2)
    script.coefficients = (2.0, -1.0)
    first = pipeline.sample(REQUEST, script, history=2).latents
    pipeline.sample(SampleRequest((1, 1), steps=6, guidance=3.0, seed=99), every(1), history=2)
    again = every(2)
    again.coefficients = (2.0, -1.0)
    np.testing.assert_array_equal(first, pipeline.sample(REQUEST, again, history=2).latents)


def test_the_first_blocks_signals_are_those_of_the_last_evaluation(pipeline: Pipeline) -> None:
    script = every(3, wants_signals=True)
    pipeline.sample(REQUEST, script, history=1)
    assert sorted(script.signals) == [(step, 0) for step in range(1, 6)]
    assert all(branch.relative_offset > 0 for signals in script.signals.values() for branch in signals)


def test_a_correction_is_refused(pipeline: Pipeline) -> None:
    script = Script(choose=always(Action.CORRECT))
    script.whole_steps = True
    with pytest.raises(PolicyError, match="whole steps"):
        pipeline.sample(REQUEST, script, history=1)
