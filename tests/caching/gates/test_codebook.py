"""AdaCache: rates by codebook, worked out by hand."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from adacorr_deploy.caching.gates.codebook import AdaCacheGate, MotionRegularisation
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PRESETS, policy_named
from adacorr_deploy.core.errors import PolicyError
from tests.caching.driven import change, drive, made, steadily


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
    with pytest.raises(PolicyError, match="needs frames"):
        made(policy, steps=8)
