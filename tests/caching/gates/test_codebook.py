"""AdaCache: rates by codebook, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from pydantic import ValidationError

from adacorr_deploy.caching.decisions import Signals
from adacorr_deploy.caching.gates.codebook import AdaCacheGate, MotionRegularisation
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PRESETS, policy_named
from adacorr_deploy.core.errors import PolicyError
from tests.caching.driven import Driven, change, drive, made, steadily


def test_the_first_limit_above_the_distance_gives_the_rate() -> None:
    gate = AdaCacheGate()
    distances = (0.0, 0.08, 0.2, 0.39, 0.5, 7.0)
    assert [gate.rate(distance) for distance in distances] == [6, 5, 4, 2, 1, 1]


def test_the_distance_is_that_per_step_of_the_rate_before() -> None:
    # Kept entries differ by 0.3 at step 1: rate 3. At step 4 by 0.3 over three steps, 0.1 each: rate 5, so step 9.
    # The last two steps are evaluated as published.
    driven = drive(made(PRESETS["adacache"], steps=14), 14, changes=steadily(0.3))
    assert driven.evaluated() == [0, 1, 4, 9, 12, 13]
    assert driven.asked == []


def test_the_distance_is_per_step_also_where_a_guard_evaluates_earlier_than_the_codebook() -> None:
    # Rate 6 at step 1, but nothing may be older than two steps: 0.3 at step 4 is 0.1 for each of the three since.
    policy = PRESETS["adacache"].model_copy(update={"guards": Guards(warmup_steps=1, final_steps=0, max_age_steps=2)})
    jumps = lambda step, span: [change(0.06 if step == 1 else 0.3)] * 2  # noqa: E731
    driven = drive(made(policy, steps=8), 8, changes=jumps)
    assert driven.evaluated() == [0, 1, 4, 7]
    assert driven.scores()[2:7] == pytest.approx([0.06, 0.06, None, 0.1, 0.1])


def test_a_larger_tolerance_skips_more() -> None:
    counts = [
        len(drive(made(policy_named(f"adacache@{tolerance}"), steps=40), 40, changes=steadily(0.3)).evaluated())
        for tolerance in (0.5, 1)
    ]
    assert counts == [40, 10]  # at half the limits, 0.3 is always in the last entry


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_distance_that_is_not_finite_evaluates_the_next_step(value: float) -> None:
    gate = AdaCacheGate(codebook=((0.1, 2), (1.0, 9)))
    policy = PRESETS["adacache"].model_copy(update={"gate": gate})
    driven = drive(made(policy, steps=8), 8, changes=lambda step, span: [change(0.01), change(value)])
    assert driven.evaluated() == list(range(8))


def test_limits_must_rise() -> None:
    with pytest.raises(ValidationError, match=r"limit 0\.1 after 0\.2"):
        AdaCacheGate(codebook=((0.2, 2), (0.1, 1)))


def test_motion_multiplies_the_distance_and_its_change_too() -> None:
    """M = (0.77 / 0.385)² / 1 = 4, from 1 three steps before: 4 + |10 · 3 / 3|."""
    factor, present = MotionRegularisation(exponent=2).factor(0.77, before=1.0, rate=3)
    assert [factor, present] == pytest.approx([14.0, 4.0])


def test_motion_of_a_model_of_images_is_refused() -> None:
    policy = PRESETS["adacache"].model_copy(update={"gate": AdaCacheGate(motion=MotionRegularisation())})
    with pytest.raises(PolicyError, match="measured between frames, and this run makes images, or clips of one frame"):
        made(policy, steps=8)


def moving(motions: Mapping[int, float], window: tuple[float, float]) -> Driven:
    """Drive AdaCache on a clip whose kept entry changes by 0.1 for each step, and moves so much at each evaluation."""
    motion = MotionRegularisation(reference=0.5, exponent=1, divisor=1, gradient=1, window=window)
    policy = PRESETS["adacache"].model_copy(update={"gate": AdaCacheGate(motion=motion)})
    evaluations = [0]

    def changes(step: int, span: int) -> list[Signals]:
        changed = change(0.1 * (step - evaluations[-1]))
        evaluations.append(step)
        return [replace(changed, motion=motions[step] / 2), replace(changed, motion=motions[step])]

    return drive(made(policy, steps=20, frames=4), 20, changes=changes)


def test_motion_multiplies_the_distance_of_every_evaluation_by_hand() -> None:
    """Distances 0.1 × factor; the more moving branch counts; m = motion / 0.5, and before the first it is 1.

    Step 1: m 1, factor 1 + |0 / 1| = 1: 0.1, rate 5. Step 6: m 2, factor 2 + |1 / 5| = 2.2: 0.22, rate 4. Step 10: m 1,
    factor 1 + |−1 / 4| = 1.25: 0.125, rate 5. Step 15: m 0.5, factor 0.5 + |−0.5 / 5| = 0.6: 0.06, rate 6.
    """
    motions = {1: 0.5, 6: 1.0, 10: 0.5, 15: 0.25, 18: 0.25, 19: 0.25}
    driven = moving(motions, (0.0, 1.0))
    assert driven.evaluated() == [0, 1, 6, 10, 15, 18, 19]
    assert [driven.scores()[step] for step in (2, 7, 11, 16)] == pytest.approx([0.1, 0.22, 0.125, 0.06])


def test_outside_its_window_motion_counts_for_nothing() -> None:
    """From step 10 on: at 1 and 6 the rate is 5. Step 11: m 2, factor 2 + |1 / 5| = 2.2: 0.22, rate 4."""
    driven = moving({1: 1.0, 6: 1.0, 11: 1.0, 15: 0.5, 18: 0.5, 19: 0.5}, (0.5, 1.0))
    assert driven.evaluated()[:5] == [0, 1, 6, 11, 15]
