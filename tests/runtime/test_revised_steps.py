"""Skipped steps are taken again: after an evaluation the latents are those of the sampler on interpolated outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.samplers import Sampler, sampler_table
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.request import NoiseStream
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import Script
from tests.runtime.tiny_dit import SCHEDULE, TinyDiT

Array = NDArray[np.float64]
STEPS = 12
EVALUATED = (0, 1, 3, 4, 7, 8, 11)  # one, two and no skipped steps between them
REQUEST = SampleRequest((0, 2), steps=STEPS, guidance=3.0, seed=7)


def skipping(revision: Revision, *, whole_steps: bool) -> Script:
    return Script(
        choose=lambda step, block: Action.EVALUATE if step in EVALUATED else Action.REUSE,
        coefficients=(1.5, -0.5),
        whole_steps=whole_steps,
        revision=revision,
    )


def interpolated(step: int, outputs: dict[int, Array], revision: Revision) -> Array:
    """Return an output on the polynomial through the last evaluations, by NumPy's own fit of each pixel."""

    def through(nodes: list[int]) -> Array:
        rows = np.stack([outputs[node].ravel() for node in nodes])
        fitted = np.polynomial.polynomial.polyfit(nodes, rows, len(nodes) - 1)
        values = np.asarray(np.polynomial.polynomial.polyval(step, fitted), np.float64)
        return values.reshape(outputs[nodes[0]].shape)

    newest = sorted(outputs)[::-1][: revision.evaluations]
    if revision is Revision.LINEAR:
        return through(newest)
    share = 1 / (1 + (newest[0] - newest[1] - 2) / 4)
    return share * through(newest) + (1 - share) * through(newest[1:])


@pytest.mark.parametrize("sampler", [Sampler.DDIM, Sampler.DPMPP_2M])
@pytest.mark.parametrize("whole_steps", [True, False])
@pytest.mark.parametrize("revision", [Revision.LINEAR, Revision.QUADRATIC])
def test_after_an_evaluation_the_latents_are_the_samplers_on_interpolated_outputs(
    pipeline: Pipeline, model: TinyDiT, revision: Revision, whole_steps: bool, sampler: Sampler
) -> None:
    request = replace(REQUEST, sampler=sampler)
    table = sampler_table(SCHEDULE, sampler, STEPS).coefficients.astype(np.float64)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table.tolist()]
    outputs: dict[int, Array] = {}
    latents = NoiseStream(request, model.spec.latent_shape).at(0).astype(np.float64)
    carried, since, compared = np.zeros_like(latents), 0, 0

    def compare(step: int, found: NDArray[np.float32]) -> None:
        nonlocal latents, carried, since, compared
        if step not in EVALUATED:
            return
        (space,) = pipeline._workspaces.values()
        slot = space.slots.output
        outputs[step] = np.asarray(slot.ring[slot.newest_entry][0].read(), np.float64)
        for again in range(since, step + 1):
            row = rows[again]
            output = outputs[step] if again == step else interpolated(again, outputs, revision)
            after = np.asarray(row["latents"] * latents + row["output"] * output + row["carried"] * carried)
            carried = row["carried_of_latents"] * latents + row["carried_of_output"] * output
            latents = after
        np.testing.assert_allclose(found, latents, rtol=1e-3, atol=1e-3)
        since, compared = step + 1, compared + 1

    result = pipeline.sample(request, skipping(revision, whole_steps=whole_steps), history=2, on_latents=compare)
    assert compared == len(EVALUATED)
    assert result.launches == len(EVALUATED) * len(model.spec.units)  # no block was launched to take steps again


@pytest.mark.parametrize("other", [Action.EVALUATE, Action.CORRECT])
def test_nothing_is_revised_across_a_step_that_was_evaluated_in_part(pipeline: Pipeline, other: Action) -> None:
    """What such a step evaluated would be thrown away: it, and the steps skipped around it, stay as they are."""

    def partly(revision: Revision) -> Script:
        def choose(step: int, block: int) -> Action:
            if step % 4 == 0:
                return Action.EVALUATE
            return other if step % 4 == 2 and block == 1 else Action.REUSE

        return Script(choose=choose, coefficients=(1.5, -0.5), revision=revision)

    plain = pipeline.sample(REQUEST, partly(Revision.NONE), history=2)
    np.testing.assert_array_equal(pipeline.sample(REQUEST, partly(Revision.LINEAR), history=2).latents, plain.latents)


@pytest.mark.parametrize("whole_steps", [True, False])
def test_without_skipped_steps_a_revision_changes_no_bit(pipeline: Pipeline, whole_steps: bool) -> None:
    every = Script(whole_steps=whole_steps, revision=Revision.QUADRATIC)
    plain = pipeline.sample(REQUEST, Script(whole_steps=whole_steps), history=2)
    np.testing.assert_array_equal(pipeline.sample(REQUEST, every, history=2).latents, plain.latents)


def test_a_step_taken_again_is_one_small_launch(pipeline: Pipeline, backend: FakeBackend) -> None:
    pipeline.sample(REQUEST, skipping(Revision.LINEAR, whole_steps=True), history=2)
    skipped, closed = STEPS - len(EVALUATED), 3  # skipped steps, and evaluations that close a skip
    assert sum(part.startswith("extrapolate") for part in backend.order) == skipped + skipped + closed


def test_nothing_of_a_request_is_left_for_the_next(pipeline: Pipeline) -> None:
    first = pipeline.sample(REQUEST, skipping(Revision.QUADRATIC, whole_steps=True), history=2).latents
    pipeline.sample(replace(REQUEST, seed=99), skipping(Revision.QUADRATIC, whole_steps=True), history=2)
    again = pipeline.sample(REQUEST, skipping(Revision.QUADRATIC, whole_steps=True), history=2).latents
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("change", [{"sampler": Sampler.DDPM}, {"eta": 0.5}])
def test_fresh_noise_is_not_drawn_again(pipeline: Pipeline, change: dict[str, object]) -> None:
    request = replace(REQUEST, **change)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=r"adds noise, and the policy takes skipped steps again"):
        pipeline.sample(request, skipping(Revision.LINEAR, whole_steps=False), history=2)
