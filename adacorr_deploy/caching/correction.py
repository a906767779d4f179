"""AdaCorrection on top of a gate: the gate proposes, the calibrated weight decides (METHOD §4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.decisions import Action, Decision, Observation, Signals, SlotHistory, Span, SpanCache
from adacorr_deploy.caching.difficulty import Difficulty, gap_of
from adacorr_deploy.caching.gates.adacorrection import Correction, Corrector
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.planner import planner_for
from adacorr_deploy.caching.run import Run
from adacorr_deploy.caching.scores import Thresholds, weight_from_estimate

_ROUNDING = 1e-9  # relative: the budget is the same sum in another order

_EVALUATED_KIND: Final = "mlp"  # of a block's units, by the cheap corrector


class OnTop:
    """Corrects a gate's proposals for one request.

    A span's estimate is the calibrated error that skipping the step adds from the span's own state (steps between its
    last two evaluations, steps since), times the request's difficulty; of several spans each spends its share of it.
    """

    observation: Observation | None = None  # it goes by costs and errors

    def __init__(
        self, settings: Correction, guards: Guards, run: Run, spans: Sequence[Span], calibration: Calibration
    ) -> None:
        self._settings = settings
        self._spans = spans
        self._kinds = run.kinds
        self._planner = planner_for(calibration, guards)
        self._price = self._planner.price(settings.speedup)
        self._budget = self._planner.expected_spending(self._price)
        self._difficulty = Difficulty(probe=calibration.probe, adaptivity=settings.adaptivity, memory=settings.memory)
        caching = [index for index, span in enumerate(spans) if span.cache is not SpanCache.NONE]
        self._share = 1 / len(caching)
        self._probed = probed_span(spans, calibration.probe.block)
        self._spent = 0.0

    def decision(
        self, step: int, span: int, history: SlotHistory, proposal: Decision, signals: Sequence[Signals] | None
    ) -> Decision:
        """Return what is done with a span that no guard evaluates."""
        skipped, gap, difficulty = step - history.steps[0] - 1, gap_of(history), self._difficulty.value
        estimate = self._planner.costs.added(step, gap, skipped) * difficulty
        allowance = self._planner.plan(self._price / difficulty).allowance(step, gap, skipped) * difficulty
        if not (allowance > 0 and math.isfinite(estimate)):
            return _decision(Action.EVALUATE, "beyond what calibration allows", estimate, 1.0)
        band = self._settings.band
        thresholds = ((1 - band) * allowance, (1 + band) * allowance, self._settings.gamma)
        weight = weight_from_estimate(estimate, thresholds)
        if weight >= 1.0:
            return _decision(Action.EVALUATE, "estimate above the allowance", estimate, weight)
        if weight == 0.0:
            return self._below(proposal, estimate)
        return self._between(step, span, proposal, estimate, weight, thresholds)

    def _below(self, proposal: Decision, estimate: float) -> Decision:
        if proposal.action is Action.REUSE:
            return self._reuse(proposal.reason, estimate, 0.0)
        if not self._settings.promote:
            return _decision(Action.EVALUATE, proposal.reason, estimate, 0.0)
        return self._reuse("promoted: estimate below the allowance", estimate, 0.0)

    def _between(
        self, step: int, span: int, proposal: Decision, estimate: float, weight: float, thresholds: Thresholds
    ) -> Decision:
        if proposal.action is Action.EVALUATE:
            return _decision(Action.EVALUATE, proposal.reason, estimate, weight)
        if self._spent + estimate * self._share <= self._budget[step] * (1 + _ROUNDING):
            return self._reuse(proposal.reason, estimate, weight)
        match self._settings.corrector:
            case Corrector.DEFER:
                return _decision(Action.EVALUATE, "error budget spent", estimate, weight)
            case Corrector.PAPER:
                return _decision(Action.CORRECT, "blended", estimate, weight, thresholds)
            case Corrector.CHEAP:
                return self._cheap(span, estimate, weight)

    def _cheap(self, span: int, estimate: float, weight: float) -> Decision:
        kind = self._kinds[self._spans[span].first]
        if kind != _EVALUATED_KIND:
            return self._reuse(f"{kind.replace('_', ' ')} half reused", estimate, weight)
        return _decision(Action.EVALUATE, "MLP half evaluated", estimate, weight)

    def _reuse(self, reason: str, estimate: float, weight: float) -> Decision:
        self._spent += estimate * self._share
        return _decision(Action.REUSE, reason, estimate, weight)

    def measures_error(self, step: int, span: int, history: SlotHistory, *, needed: int) -> bool:
        """Whether the span is the one whose errors tell the difficulty, with as many evaluations as are `needed`."""
        if span != self._probed or len(history.steps) < needed:
            return False
        self._difficulty.expect(step, history)
        return True

    def record_error(self, step: int, error: float) -> None:
        self._difficulty.record(step, error)

    @property
    def difficulty(self) -> float:
        return self._difficulty.value


def probed_span(spans: Sequence[Span], block: int) -> int:
    """Return the span whose errors tell the difficulty: the one that caches the probed block part, or the nearest."""
    caching = [index for index, span in enumerate(spans) if span.cache is not SpanCache.NONE]
    return next((index for index in caching if block < spans[index].stop), caching[-1])


def _decision(
    action: Action, reason: str, estimate: float, weight: float, thresholds: Thresholds | None = None
) -> Decision:
    return Decision(action=action, reason=reason, score=estimate, weight=weight, thresholds=thresholds)
