"""The calibrated plan as one request follows it: what skipping adds, what it may, and what was spent (METHOD §3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.decisions import Action, Decision, SlotHistory, Span, SpanCache
from adacorr_deploy.caching.difficulty import Difficulty
from adacorr_deploy.caching.gates.adacorrection import AdaCorrectionGate, Correction
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.planner import planner_for
from adacorr_deploy.caching.scores import Thresholds, weight_from_estimate

_ROUNDING: Final = 1e-9  # relative: what was spent may be the budget's sum in another order


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """One step's error by skipping against what it may be.

    Attributes:
        estimate: ê, which is infinite where calibration skipped no step so far from its last evaluation.
        weight: w, in [0, 1].
        thresholds: τ_reuse, τ_recompute and γ; None where nothing may be added, and w is 1.
    """

    estimate: float
    weight: float
    thresholds: Thresholds | None

    def decision(self, action: Action, reason: str) -> Decision:
        return Decision(
            action=action,
            reason=reason,
            score=self.estimate,
            weight=self.weight,
            thresholds=self.thresholds if action is Action.CORRECT else None,
        )


class RequestPlan:
    """The estimate ê of a step is the error that skipping it adds by calibration, times the request's difficulty.

    Difficulty is how much larger than in calibration the probe errors were at the request's own evaluations. Harder by
    r² is the same as an evaluation cheaper by r², so the allowance comes from the plan at that price. `adaptivity` says
    how far difficulty counts: at 0 every request follows the schedule of the average one.
    """

    def __init__(
        self,
        settings: AdaCorrectionGate | Correction,
        guards: Guards,
        spans: Sequence[Span],
        calibration: Calibration,
    ) -> None:
        """Begin one request.

        Args:
            settings: Target, band, γ, adaptivity and memory.
            guards: The policy's.
            spans: Its division of the block parts.
            calibration: Of the policy's predictor and spans.
        """
        self._settings = settings
        self._planner = planner_for(calibration, guards)
        self._price = self._planner.price(settings.speedup)
        self._budget = self._planner.expected_spending(self._price)
        self._spent = 0.0
        self._difficulty = Difficulty(probe=calibration.probe, adaptivity=settings.adaptivity, memory=settings.memory)
        self._probed = probed_span(spans, calibration.probe.block)
        self._needed = min(2, calibration.predictor.history)  # evaluations, for an error that calibration expects

    @property
    def difficulty(self) -> float:
        """Squared error of the request's predictions over that of calibration's, as far as it counts."""
        return self._difficulty.value

    def weighed(self, step: int, gap: int, skipped: int) -> Weighed:
        """Weigh skipping `step`.

        Args:
            step: Index of the step.
            gap: Steps between the last two evaluations.
            skipped: Steps since the last one that were skipped already.
        """
        difficulty, settings = self._difficulty.value, self._settings
        estimate = self._planner.costs.added(step, gap, skipped) * difficulty
        allowance = self._planner.plan(self._price / difficulty).allowance(step, gap, skipped) * difficulty
        if not (allowance > 0 and math.isfinite(estimate)):
            return Weighed(estimate=estimate, weight=1.0, thresholds=None)
        thresholds = ((1 - settings.band) * allowance, (1 + settings.band) * allowance, settings.gamma)
        return Weighed(estimate=estimate, weight=weight_from_estimate(estimate, thresholds), thresholds=thresholds)

    def affords(self, step: int, error: float) -> bool:
        """Whether an error more is within what the plan of an average request has spent up to `step`."""
        return self._spent + error <= self._budget[step] * (1 + _ROUNDING)

    def spend(self, error: float) -> None:
        """Note the estimated error of what was reused."""
        self._spent += error

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        """Whether the span's prediction tells the difficulty; of one that does, `record_error` takes the error."""
        if span != self._probed or len(history.steps) < self._needed:
            return False
        self._difficulty.expect(step, history)
        return True

    def record_error(self, step: int, error: float) -> None:
        """Take the relative error of that prediction."""
        self._difficulty.record(step, error)


def probed_span(spans: Sequence[Span], block: int) -> int:
    """Return the span whose errors tell the difficulty: the one that caches the probed block part, or the nearest."""
    caching = [index for index, span in enumerate(spans) if span.cache is not SpanCache.NONE]
    return next((index for index in caching if block < spans[index].stop), caching[-1])
