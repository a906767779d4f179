"""Plans by price, solved once for a calibration and its guards and shared by all requests."""

from __future__ import annotations

import math
from functools import lru_cache

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.schedule import Plan, SkipCosts, evaluations_for_speedup, price_for_evaluations

_PRICE_STEPS = 20  # plans kept per factor e of price: 5 % apart, so that few plans serve all requests
_PLANS_KEPT = 128  # of a calibration and its guards; one of 1000 steps takes a megabyte


class Planner:
    """Answers which plan a price or a target speed-up leads to."""

    def __init__(self, costs: SkipCosts, guards: Guards) -> None:
        self.costs = costs
        self._guards = guards
        self._plan_at = lru_cache(maxsize=_PLANS_KEPT)(self._solved)
        self._prices: dict[float, float] = {}

    def price(self, speedup: float) -> float:
        """Return the lowest tabulated price at which at most steps ÷ `speedup` steps are evaluated."""
        if speedup not in self._prices:
            evaluations = evaluations_for_speedup(self.costs.steps, speedup)
            least = price_for_evaluations(self.costs, self._guards, evaluations)
            # Up, not to the nearest: below this price the plan would evaluate more than asked for.
            self._prices[speedup] = math.exp(math.ceil(math.log(least) * _PRICE_STEPS) / _PRICE_STEPS)
        return self._prices[speedup]

    def plan(self, price: float) -> Plan:
        """Return the plan at the nearest tabulated price."""
        return self._plan_at(round(math.log(price) * _PRICE_STEPS))

    def _solved(self, index: int) -> Plan:
        return Plan(self.costs, self._guards, math.exp(index / _PRICE_STEPS))

    def expected_spending(self, price: float) -> tuple[float, ...]:
        """Return, per step, the calibrated error that the plan at `price` has spent up to and including it."""
        evaluated = set(self.plan(price).evaluated_steps())
        spent, gap, skipped, totals = 0.0, 1, 0, []
        for step in range(self.costs.steps):
            if step in evaluated:
                gap, skipped = skipped + 1, 0
            else:
                spent += self.costs.added(step, gap, skipped)
                skipped += 1
            totals.append(spent)
        return tuple(totals)


@lru_cache(maxsize=32)
def planner_for(calibration: Calibration, guards: Guards) -> Planner:
    return Planner(SkipCosts(values=calibration.skip_costs), guards)
