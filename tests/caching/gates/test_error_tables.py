"""Schedules from calibrated error tables, worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.caching.gates.error_tables import accumulated_schedule, smooth_schedule
from adacorr_deploy.caching.policy import PRESETS, policy_named
from adacorr_deploy.core.errors import CalibrationError
from tests.caching.driven import drive, made
from tests.caching.scripted_profile import profile


def evaluated(schedule: list[bool]) -> list[int]:
    return [step for step, is_evaluated in enumerate(schedule) if is_evaluated]


def test_smoothcache_takes_the_longest_run_whose_error_is_small_enough() -> None:
    """Errors 0.1 per step of age, but step 5 is hard: 0.5 at any age."""
    table = [[0.5 if step == 5 else 0.1 * age for age in (1, 2, 3)] for step in range(10)]
    # From 0: age 2 has 0.2 ≤ 0.2, age 3 has 0.3: skip 1, 2. From 3: age 2 is step 5, 0.5; age 1 is step 4: skip it.
    # From 5: skip 6, 7. From 8: age 1 is step 9: skipped, but the last step is evaluated.
    assert evaluated(smooth_schedule(table, alpha=0.2, max_skipped=3)) == [0, 3, 5, 8, 9]


def test_smoothcache_never_skips_more_than_its_limit() -> None:
    table = [[0.0] * 6 for _ in range(9)]
    assert evaluated(smooth_schedule(table, alpha=0.1, max_skipped=2)) == [0, 3, 6, 8]


@given(
    errors=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=20), alpha=st.floats(0, 1)
)
def test_every_step_that_smoothcache_skips_is_within_alpha_at_the_end_of_its_run(
    errors: list[list[float]], alpha: float
) -> None:
    steps = evaluated(smooth_schedule(errors, alpha=alpha, max_skipped=3))
    assert steps[0] == 0
    assert steps[-1] == len(errors) - 1
    for step, following in itertools.pairwise(steps):
        skipped = following - step - 1
        assert skipped <= 3
        if skipped and following != len(errors) - 1:
            assert errors[step + skipped][skipped - 1] <= alpha


def test_block_caching_reuses_until_the_changes_add_up() -> None:
    # 0.2 + 0.2 = 0.4 ≤ 0.5, + 0.2 > 0.5: step 3; then 0.4, + 0.4 > 0.5: step 5; then 0.1.
    changes = [math.inf, 0.2, 0.2, 0.2, 0.4, 0.4, 0.1]
    assert evaluated(accumulated_schedule(changes, delta=0.5)) == [0, 3, 5]


def test_block_caching_decides_each_part_by_its_own_changes() -> None:
    """0.1 a step for the first part, 0.2 for the second; δ = 0.35."""
    policy = policy_named("block-caching@0.35")
    controller = made(policy, steps=9, profile=profile(steps=9))
    driven = drive(controller, 9)
    assert driven.evaluated(0) == [0, 4, 8]
    assert driven.evaluated(1) == [0, 2, 4, 6, 8]
    affine = controller.affine(0)
    assert affine is not None
    assert (affine.scale, affine.shift) == ((2.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("halves", [False, True])
def test_smoothcache_decides_by_kind_of_half_or_by_the_worse_of_a_block(halves: bool) -> None:
    """Errors are 0.1 per step of age for attention, 0.2 for MLP; α = 0.25."""
    driven = drive(made(policy_named("smoothcache@0.25"), steps=8, halves=halves, profile=profile(steps=8)), 8)
    assert driven.evaluated(1) == [0, 2, 4, 6, 7]
    assert driven.evaluated(0) == ([0, 3, 6, 7] if halves else [0, 2, 4, 6, 7])


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("smoothcache", "unit_errors"),
        ("block-caching", "part_errors"),
        ("lazydit", "gates"),
        ("teacache", "output_change"),
        ("magcache", "magnitude_ratios"),
        ("fastcache", "affine map of the block parts 0 … 0"),
    ],
)
def test_without_its_quantity_a_policy_is_refused_with_the_command(name: str, quantity: str) -> None:
    bare = profile(steps=8).model_copy(
        update=dict.fromkeys(
            ("output_change", "magnitude_ratios", "unit_errors", "part_errors", "affine", "gates"), None
        )
    )
    for missing in (None, bare):
        with pytest.raises(CalibrationError, match=rf"{quantity}.*adacorr-calibrate BUNDLE --policies {name}"):
            made(PRESETS[name], steps=8, profile=missing)


def test_the_tables_agree_with_numpy_on_what_accumulates() -> None:
    changes = np.random.default_rng(0).uniform(0, 0.4, 50)
    steps = evaluated(accumulated_schedule(list(changes), delta=0.5))
    for start, stop in zip(steps, [*steps[1:], 50], strict=True):
        assert np.cumsum(changes[start + 1 : stop]).max(initial=0.0) <= 0.5
        if stop < 50:
            assert changes[start + 1 : stop + 1].sum() > 0.5
