"""TeaCache, EasyCache and MagCache on trajectories whose sums can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from adacorr_deploy.caching.decisions import Kept, Observed
from adacorr_deploy.caching.gates.accumulated import MagCacheGate
from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.caching.profile import ChangePolynomial
from tests.caching.driven import change, drive, each_step, made, steadily
from tests.caching.scripted_profile import profile


def test_teacache_adds_up_changes_and_starts_anew_at_an_evaluation() -> None:
    controller = made(PRESETS["teacache"], steps=10, profile=profile(steps=10))
    driven = drive(controller, 10, signals=steadily(0.09))
    # 0.09, 0.18, 0.27 ≥ 0.2; the last step is evaluated as published, and not asked for.
    assert driven.evaluated() == [0, 3, 6, 9]
    assert driven.scores()[1:4] == pytest.approx([0.09, 0.18, 0.27])
    assert (9, 0) not in driven.asked
    (observation,) = controller.observations(0)
    assert (observation.what, observation.kept) == (Observed.MODULATED, Kept.STEP)


def test_teacache_rescales_by_the_calibrated_polynomial() -> None:
    """f(x) = 3x² + 0.01: 0.04 a step at x = 0.1, so that 0.2 is reached at the fifth."""
    polynomial = ChangePolynomial(coefficients=(0.0, 0.0, 3.0, 0.0, 0.01), low=0.0, high=1.0)
    measured = profile(steps=12).model_copy(update={"output_change": polynomial})
    driven = drive(made(PRESETS["teacache"], steps=12, profile=measured), 12, signals=steadily(0.1))
    assert driven.evaluated() == [0, 5, 10, 11]


def test_teacache_takes_the_worse_branch() -> None:
    driven = drive(
        made(PRESETS["teacache"], steps=6, profile=profile(steps=6)),
        6,
        signals=lambda step, span: [change(0.01), change(0.11)],
    )
    assert driven.evaluated() == [0, 2, 4, 5]


def easycache(threshold: float) -> Policy:
    base = PRESETS["easycache"]
    guards = base.guards.model_copy(update={"warmup_steps": 3})
    return policy_named(f"easycache@{threshold}").model_copy(update={"guards": guards})


def test_easycache_measures_its_gain_in_the_warm_up_and_at_each_evaluation() -> None:
    """The input moves by 1 a step; what is kept has the norm 10 and moves by 0.4 a step, later by 0.9 in three."""
    moved = {1: 0.4, 2: 0.4, 5: 0.9}
    driven = drive(
        made(easycache(0.1), steps=12),
        12,
        signals=steadily(0.5, norm=2.0),
        changes=lambda step, span: [change(moved.get(step, 1.2) / 10, norm=10.0)] * 2,
    )
    # k/‖v‖ = 0.4 / (1 · 10): 0.04, 0.08, 0.12 ≥ 0.1 at step 5. Then 0.9 / (3 · 10): 0.03 a step, 0.12 at step 9.
    assert driven.evaluated() == [0, 1, 2, 5, 9, 11]
    assert driven.scores()[3:10] == pytest.approx([0.04, 0.08, 0.12, 0.03, 0.06, 0.09, 0.12])
    assert driven.asked[0] == (1, 0)


def test_easycache_evaluates_before_any_gain_is_measured() -> None:
    base = PRESETS["easycache"]
    guards = base.guards.model_copy(update={"warmup_steps": 0})
    driven = drive(made(base.model_copy(update={"guards": guards}), steps=4), 4, signals=steadily(0.0))
    assert driven.evaluated() == [0, 1, 2, 3]  # an input that doesn't move tells no gain


def test_magcache_multiplies_ratios_and_adds_up_their_distance_from_one() -> None:
    """Ratios of 0.97: 0.03, then 0.03 + (1 − 0.9409) = 0.0891 > 0.06. The first 0.2 · 10 steps are retained."""
    driven = drive(made(PRESETS["magcache"], steps=10, profile=profile(steps=10)), 10)
    assert driven.evaluated() == [0, 1, 3, 5, 7, 9]
    assert driven.scores()[2:4] == pytest.approx([0.03, 0.0891])


def test_magcache_skips_no_more_than_k_in_a_row() -> None:
    measured = profile(steps=10).model_copy(update={"magnitude_ratios": (1.0,) * 10})
    driven = drive(made(PRESETS["magcache"], steps=10, profile=measured), 10)
    assert driven.evaluated() == [0, 1, 5, 9]


def test_the_retained_share_is_rounded_as_published() -> None:
    assert [MagCacheGate().retained_steps(steps) for steps in (2, 3, 28, 50)] == [0, 1, 6, 10]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["teacache", "easycache"])
def test_a_change_that_is_not_finite_forces_an_evaluation_and_is_forgotten(name: str, value: float) -> None:
    changes = [0.001] * 20
    changes[15] = value
    driven = drive(
        made(PRESETS[name], steps=20, profile=profile(steps=20)), 20, signals=each_step(changes), changes=steadily(1e-3)
    )
    assert 15 in driven.evaluated()
    assert {14, 17, 18} & set(driven.evaluated()) == set()  # 16: EasyCache has no gain until then
