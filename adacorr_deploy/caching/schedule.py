"""Which steps to evaluate: a shortest path over measured final-output error.

Calibration measures `cost[j][g][k]`: the squared error that skipping steps j … j+k−1 leaves in the final latents, when
the two evaluations before them lie g steps apart (a predictor that extrapolates is the worse the wider its base). A run
is then a path over states (step, gap, steps skipped so far), an evaluation has a price, and dynamic programming gives
the cheapest way on from every state: at the price for which the whole path has the wanted number of evaluations this
is the static schedule, and at a request's own price it is the rule that AdaCorrection corrects the schedule with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from adacorr_deploy.caching.guards import Guards

Costs = Sequence[Sequence[Sequence[float]]]  # [step j][gap g, from 1][skipped k, from 1], both offset by one


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipCosts:
    """Calibrated costs of skipping.

    Attributes:
        values: `values[j][g − 1][k − 1]` for first skipped step j, gap g and k skipped steps: squared error of the
            final latents, per element; infinite where it can't be. Over k it never falls (`Calibration` sees to it),
            so that a further skipped step always adds something: the planner and its allowances rest on that.
    """

    values: Costs
    _added: Costs = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_added", [[_increments(row) for row in rows] for rows in self.values])

    @property
    def steps(self) -> int:
        return len(self.values)

    @property
    def max_gap(self) -> int:
        return len(self.values[0])

    @property
    def max_skipped(self) -> int:
        return len(self.values[0][0])

    def added(self, step: int, gap: int, skipped: int) -> float:
        """Return the error added by skipping `step` too, after `skipped` steps before it were skipped."""
        if skipped >= self.max_skipped:
            return math.inf
        return self._added[step - skipped][min(gap, self.max_gap) - 1][skipped]

    def increments(self, first: int) -> Sequence[Sequence[float]]:
        """Return what each further skipped step adds to a skip that begins at `first`, [gap − 1][skipped]."""
        return self._added[first]


def _increments(row: Sequence[float]) -> list[float]:
    """Return what each further skipped step adds; infinite from the first that can't be skipped."""
    differences = [later - earlier for earlier, later in itertools.pairwise((0.0, *row))]
    return [difference if math.isfinite(difference) else math.inf for difference in differences]


class Plan:
    """The cheapest way on from every state, at one price of an evaluation.

    A gap is counted from the evaluation before last to the last; `skipped` from the last evaluation to this step.
    """

    def __init__(self, costs: SkipCosts, guards: Guards, price: float) -> None:
        self._costs = costs
        self._price = price
        self._first_free = max(guards.warmup_steps, 2)  # an extrapolation needs two evaluations
        self._final = costs.steps - guards.final_steps
        self._max_skipped = min(guards.max_age_steps, costs.max_skipped)
        self._ahead = self._solve()

    def _solve(self) -> list[list[list[float]]]:
        """Return ahead[step][gap − 1][skipped]: the least cost from that state to the end."""
        costs, price, max_gap, longest = self._costs, self._price, self._costs.max_gap, self._max_skipped
        gaps = [min(skipped + 1, max_gap) - 1 for skipped in range(longest + 1)]  # what evaluating now leaves
        ahead = [[[0.0] * (longest + 1) for _ in range(max_gap)]]
        for step in range(costs.steps - 1, -1, -1):
            after = ahead[-1]
            # Evaluating leads to the gap that the skipped steps leave, whatever the gap was before.
            evaluating = [price + after[gap][0] for gap in gaps]
            here = [evaluating.copy() for _ in range(max_gap)]
            for skipped in range(longest):
                if self._may_skip(step, skipped):
                    added = costs.increments(step - skipped)
                    for row, then, more in zip(here, after, added, strict=True):
                        row[skipped] = min(row[skipped], more[skipped] + then[skipped + 1])
            ahead.append(here)
        ahead.reverse()
        return ahead

    def _may_skip(self, step: int, skipped: int) -> bool:
        return skipped < self._max_skipped and max(self._first_free, skipped) <= step < self._final

    def allowance(self, step: int, gap: int, skipped: int) -> float:
        """Return the error that skipping `step` may add before evaluating is cheaper; −∞ where it can't be skipped."""
        if not self._may_skip(step, skipped):
            return -math.inf
        gap = min(gap, self._costs.max_gap)
        after = self._ahead[step + 1]
        return self._price + after[min(skipped + 1, self._costs.max_gap) - 1][0] - after[gap - 1][skipped + 1]

    def evaluated_steps(self) -> tuple[int, ...]:
        """Return the steps that the cheapest path evaluates, in order."""
        evaluated, gap, skipped = [], 1, 0
        for step in range(self._costs.steps):
            if self._costs.added(step, gap, skipped) <= self.allowance(step, gap, skipped):
                skipped += 1
            else:
                evaluated.append(step)
                gap, skipped = skipped + 1, 0
        return tuple(evaluated)


def evaluations_for_speedup(steps: int, speedup: float) -> int:
    """Return how many of `steps` may be evaluated for a speed-up of at least `speedup`."""
    return math.floor(steps / speedup + 1e-9)


def price_for_evaluations(costs: SkipCosts, guards: Guards, evaluations: int) -> float:
    """Return the lowest price at which the cheapest path evaluates at most `evaluations` steps.

    The number of evaluations falls as the price rises; it moves in jumps, so that the path may hold fewer than asked
    for. Where even an infinite price leaves more (guards, maximum age), that path is returned.
    """
    finite = [value for step in costs.values for gap in step for value in gap if math.isfinite(value) and value > 0]
    low, high = (math.log(min(finite)) - 5, math.log(max(finite)) + 5) if finite else (0.0, 1.0)
    for _ in range(30):
        middle = (low + high) / 2
        if len(Plan(costs, guards, math.exp(middle)).evaluated_steps()) > evaluations:
            low = middle
        else:
            high = middle
    return math.exp(high)
