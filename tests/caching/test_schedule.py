"""The schedule is the shortest path: no set of evaluated steps of the same size costs less (checked by brute force)."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.planner import Planner
from adacorr_deploy.caching.schedule import Plan, SkipCosts, price_for_evaluations

STEPS = 9
GUARDS = Guards(warmup_steps=2, final_steps=1, max_age_steps=3)
increments = st.floats(0.01, 10.0)


@st.composite
def costs(draw: st.DrawFn) -> SkipCosts:
    """Costs that rise with every further skipped step."""
    cube = [
        [list(itertools.accumulate(draw(st.lists(increments, min_size=3, max_size=3)))) for _ in range(3)]
        for _ in range(STEPS)
    ]
    return SkipCosts(values=cube)


def path_cost(costs: SkipCosts, evaluated: set[int]) -> float:
    """Cost of a set of evaluated steps, straight from the definition; infinite where a run of skips is too long."""
    total, gap, skipped = 0.0, 1, 0
    for step in range(costs.steps):
        if step in evaluated:
            gap, skipped = skipped + 1, 0
        elif skipped == costs.max_skipped:
            return math.inf
        else:
            total += costs.added(step, gap, skipped)
            skipped += 1
    return total


@settings(max_examples=40, deadline=None)
@given(costs=costs(), price=st.floats(0.05, 20.0))
def test_the_plan_is_the_cheapest_of_all_sets_of_steps(costs: SkipCosts, price: float) -> None:
    forced = {0, 1, STEPS - 1}
    free = [step for step in range(STEPS) if step not in forced]
    candidates = [
        forced | set(chosen) for size in range(len(free) + 1) for chosen in itertools.combinations(free, size)
    ]
    best = min(path_cost(costs, chosen) + price * len(chosen) for chosen in candidates)
    evaluated = set(Plan(costs, GUARDS, price).evaluated_steps())
    assert forced <= evaluated
    assert path_cost(costs, evaluated) + price * len(evaluated) == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(costs=costs(), wanted=st.integers(3, STEPS))
def test_a_price_leads_to_at_most_the_wanted_evaluations(costs: SkipCosts, wanted: int) -> None:
    price = price_for_evaluations(costs, GUARDS, wanted)
    count = len(Plan(costs, GUARDS, price).evaluated_steps())
    fewest = len(Plan(costs, GUARDS, 1e9).evaluated_steps())
    assert count <= max(wanted, fewest)


def test_costs_that_cannot_be_are_never_taken() -> None:
    blocked = SkipCosts(values=[[[math.inf] * 3] * 3] * STEPS)
    assert Plan(blocked, GUARDS, 1e9).evaluated_steps() == tuple(range(STEPS))


def test_allowance_is_minus_infinity_where_a_guard_forbids_skipping() -> None:
    plan = Plan(SkipCosts(values=[[[1.0, 2.0, 3.0]] * 3] * STEPS), GUARDS, 1.0)
    assert plan.allowance(1, 1, 0) == -math.inf
    assert plan.allowance(STEPS - 1, 1, 0) == -math.inf
    assert plan.allowance(6, 1, 3) == -math.inf
    assert math.isfinite(plan.allowance(4, 1, 1))


def test_expected_spending_never_falls_and_ends_at_the_path_cost() -> None:
    costs = SkipCosts(values=[[[0.1 * (j + 1) * k for k in (1, 2, 3)]] * 3 for j in range(STEPS)])
    planner = Planner(costs, GUARDS)
    price = planner.price(2.0)
    spending = planner.expected_spending(price)
    assert list(spending) == sorted(spending)
    assert spending[-1] == pytest.approx(path_cost(costs, set(planner.plan(price).evaluated_steps())))
