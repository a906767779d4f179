"""A target speed-up is kept by the plan that is used for it, and plans are solved once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.planner import Planner, planner_for
from adacorr_deploy.caching.schedule import Plan, SkipCosts
from tests.caching.scripted_calibration import calibration

STEPS = 12
GUARDS = Guards(warmup_steps=2, final_steps=1, max_age_steps=4)
increments = st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4)


@st.composite
def skip_costs(draw: st.DrawFn) -> SkipCosts:
    """Costs that rise with every further skipped step, and differ from step to step and gap to gap."""
    return SkipCosts(
        values=[[list(itertools.accumulate(draw(increments))) for _ in range(2)] for _ in range(STEPS)],
    )


@settings(max_examples=20)
@given(costs=skip_costs(), speedup=st.floats(1.0, 5.0))
def test_the_plan_of_a_target_evaluates_no_more_than_it_allows(costs: SkipCosts, speedup: float) -> None:
    """Plans are tabulated at few prices: rounding a target's price down would buy an evaluation too many."""
    planner = Planner(costs, GUARDS)
    evaluated = len(planner.plan(planner.price(speedup)).evaluated_steps())
    fewest = len(Plan(costs, GUARDS, 1e12).evaluated_steps())
    assert evaluated <= max(int(STEPS / speedup + 1e-9), fewest)


@settings(max_examples=20)
@given(costs=skip_costs(), price=st.floats(1e-3, 1e3))
def test_a_tabulated_plan_is_that_of_a_price_within_its_grid(costs: SkipCosts, price: float) -> None:
    """The number of evaluations falls with the price, so it lies between those of prices 2.6 % to either side."""
    counts = [len(Plan(costs, GUARDS, price * factor).evaluated_steps()) for factor in (1.026, 1 / 1.026)]
    tabulated = len(Planner(costs, GUARDS).plan(price).evaluated_steps())
    assert counts[0] <= tabulated <= counts[1]


@settings(max_examples=20)
@given(costs=skip_costs(), speedup=st.floats(1.0, 5.0))
def test_expected_spending_is_the_sum_of_what_the_plans_skips_cost(costs: SkipCosts, speedup: float) -> None:
    """The oracle reads the costs of whole runs of skips; the planner adds them up step by step."""
    planner = Planner(costs, GUARDS)
    price = planner.price(speedup)
    evaluated = planner.plan(price).evaluated_steps()
    total = 0.0
    for before, last, after in zip((evaluated[0] - 1, *evaluated), evaluated, (*evaluated[1:], STEPS), strict=False):
        if skipped := after - last - 1:
            total += costs.values[last + 1][min(last - before, costs.max_gap) - 1][skipped - 1]
    spending = planner.expected_spending(price)
    assert len(spending) == STEPS
    assert spending[-1] == pytest.approx(total)
    assert all(spending[step] == (spending[step - 1] if step else 0.0) for step in evaluated)


def test_a_speedup_of_one_skips_nothing_and_the_largest_skips_all_that_the_guards_leave() -> None:
    planner = planner_for(calibration(), Guards(warmup_steps=2, final_steps=1, max_age_steps=3))
    assert planner.plan(planner.price(1.0)).evaluated_steps() == tuple(range(12))
    assert len(planner.plan(planner.price(20.0)).evaluated_steps()) == 5  # 0 1 · · · 5 · · · 9 · 11, or its like


def test_plans_are_solved_once_for_equal_calibrations_and_guards() -> None:
    """Every request asks anew with what it read from the bundle; solving takes longer than many a step."""
    planner = planner_for(calibration(), GUARDS)
    assert planner_for(calibration(), GUARDS.model_copy()) is planner
    assert planner.plan(planner.price(2.0)) is planner.plan(planner.price(2.0))
    assert planner_for(calibration(slope=0.5), GUARDS) is not planner
    assert planner_for(calibration(), Guards(warmup_steps=3)) is not planner
