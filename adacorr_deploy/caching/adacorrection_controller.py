"""AdaCorrection alone: the calibrated schedule, corrected by what each request measures (METHOD §3, `robust`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.correction import probed_span
from adacorr_deploy.caching.decisions import (
    Action,
    Decision,
    Measured,
    Observation,
    Observed,
    Signals,
    SlotHistory,
    Span,
)
from adacorr_deploy.caching.difficulty import Difficulty, gap_of
from adacorr_deploy.caching.gates.adacorrection import AdaCorrectionGate, Corrector
from adacorr_deploy.caching.guards import BEYOND_CALIBRATION, NOT_FINITE, doubtful
from adacorr_deploy.caching.planner import planner_for
from adacorr_deploy.caching.policy_controller import PolicyController
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.run import Run
from adacorr_deploy.caching.scores import robust_score, weight_from_estimate


class AdaCorrectionController(PolicyController):
    """The calibrated schedule, corrected by what this request measures.

    A step's blocks decide together, at its first block: METHOD §3's study found that blocks evaluated on partly
    predicted inputs spoil the histories that extrapolation needs. The estimate ê of a step is the error that skipping
    it adds by calibration, times the difficulty of the request: how much larger than in calibration the probe errors
    were at its own evaluations. Harder by r² is the same as an evaluation cheaper by r², so the allowance
    comes from the plan at that price. `adaptivity` says how far difficulty counts: at 0 every request follows the
    schedule of the average one.
    """

    def __init__(
        self, policy: Policy, gate: AdaCorrectionGate, run: Run, spans: tuple[Span, ...], calibration: Calibration
    ) -> None:
        super().__init__(policy, run, spans)
        self._gate = gate
        self._calibration = calibration
        self._planner = planner_for(calibration, policy.guards)
        self._price = self._planner.price(gate.speedup)
        self._budget = self._planner.expected_spending(self._price)
        self._difficulty = Difficulty(probe=calibration.probe, adaptivity=gate.adaptivity, memory=gate.memory)
        self._spent = 0.0
        self._decided: tuple[int, Decision] | None = None
        self._steps = SlotHistory(capacity=2)  # that were not skipped; protected blocks have more of their own
        self._probed = probed_span(spans, calibration.probe.block)

    def observations(self, span: int) -> Sequence[Observation]:
        return (Observation(what=Observed.INPUT),) if span == 0 else ()

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> Sequence[bool]:
        return (self._step_guard(step) is None,) if span == 0 else ()

    def _step_guard(self, step: int) -> str | None:
        return self._policy.guards.reason(step=step, steps=self._run.steps, age=self._steps.age(step))

    def decide(self, step: int, span: int, history: SlotHistory, signals: Measured) -> Decision:
        if self._decided is None or self._decided[0] != step:
            self._decided = (step, self._decide_step(step, history, signals[0] if signals else None))
            if self._decided[1].action is not Action.REUSE:
                self._steps.record(step)
        decision = self._decided[1]
        guard = self._guard(step, span, history)
        if guard and decision.action is not Action.EVALUATE:
            return Decision(action=Action.EVALUATE, reason=guard, score=decision.score, weight=decision.weight)
        return decision

    def _decide_step(self, step: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        guard = self._step_guard(step)
        if guard or (signals is None and not self.lags) or (signals is not None and doubtful(signals)):
            return Decision(action=Action.EVALUATE, reason=guard or NOT_FINITE)
        age, gap = step - self._steps.steps[0], gap_of(self._steps)
        if signals is not None:
            offset = max(robust_score(branch) for branch in signals)
            if offset > self._offset_limit(step - self.lags, (history.age(step) or 1) - self.lags):
                return Decision(action=Action.EVALUATE, reason=BEYOND_CALIBRATION, score=offset, weight=1.0)
        plan = self._planner.plan(self._price / self.difficulty)
        estimate = self._planner.costs.added(step, gap, age - 1) * self.difficulty
        allowance = plan.allowance(step, gap, age - 1) * self.difficulty
        return self._weighed(step, estimate, allowance)

    def _offset_limit(self, step: int, age: int) -> float:
        """Return the largest score that is within calibration for inputs of `step`, `age` steps after an evaluation."""
        limits = self._calibration.offset_limits[step]
        return self._gate.offset_margin * limits[min(max(age, 1), len(limits)) - 1]

    def _weighed(self, step: int, estimate: float, allowance: float) -> Decision:
        if allowance <= 0 or not math.isfinite(estimate):
            return Decision(action=Action.EVALUATE, reason="evaluating pays in any case", score=estimate, weight=1.0)
        thresholds = ((1 - self._gate.band) * allowance, (1 + self._gate.band) * allowance, self._gate.gamma)
        weight = weight_from_estimate(estimate, thresholds)
        if weight >= 1.0:
            return Decision(
                action=Action.EVALUATE, reason="estimate above the allowance", score=estimate, weight=weight
            )
        if weight > 0.0:
            if self._gate.corrector is Corrector.PAPER:
                return Decision(
                    action=Action.CORRECT, reason="blended", score=estimate, weight=weight, thresholds=thresholds
                )
            if self._spent + estimate > self._budget[step]:
                return Decision(action=Action.EVALUATE, reason="error budget spent", score=estimate, weight=weight)
        self._spent += estimate
        reason = "estimate below the allowance" if weight == 0.0 else "deferred within the error budget"
        return Decision(action=Action.REUSE, reason=reason, score=estimate, weight=weight)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        if span != self._probed or len(history.steps) < min(2, self._policy.predictor.history):
            return False
        self._difficulty.expect(step, history)
        return True

    def record_error(self, step: int, span: int, error: float) -> None:
        self._difficulty.record(step, error)

    @property
    def difficulty(self) -> float:
        return self._difficulty.value
