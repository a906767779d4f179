"""AdaCorrection alone: the calibrated schedule, corrected by what each request measures (METHOD §3, `robust`)."""

from __future__ import annotations

from collections.abc import Sequence

from adacorr_deploy.caching.calibration import Calibration
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
from adacorr_deploy.caching.difficulty import gap_of
from adacorr_deploy.caching.gates.adacorrection import AdaCorrectionGate, Corrector
from adacorr_deploy.caching.guards import BEYOND_CALIBRATION, NOT_FINITE, doubtful
from adacorr_deploy.caching.policy_controller import PolicyController
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.request_plan import RequestPlan, Weighed
from adacorr_deploy.caching.run import Run
from adacorr_deploy.caching.scores import robust_score


class AdaCorrectionController(PolicyController):
    """The calibrated schedule, corrected by what this request measures.

    A step's blocks decide together, at its first block: METHOD §3's study found that blocks evaluated on partly
    predicted inputs spoil the histories that extrapolation needs. See `RequestPlan` for the estimate and its allowance.
    """

    def __init__(
        self, policy: Policy, gate: AdaCorrectionGate, run: Run, spans: tuple[Span, ...], calibration: Calibration
    ) -> None:
        super().__init__(policy, run, spans)
        self._gate = gate
        self._calibration = calibration
        self._plan = RequestPlan(gate, policy.guards, spans, calibration)
        self._decided: tuple[int, Decision] | None = None
        self._steps = SlotHistory(capacity=2)  # that were not skipped; protected blocks have more of their own

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
        return self._weighed(step, self._plan.weighed(step, gap, age - 1))

    def _offset_limit(self, step: int, age: int) -> float:
        """Return the largest score that is within calibration for inputs of `step`, `age` steps after an evaluation."""
        limits = self._calibration.offset_limits[step]
        return self._gate.offset_margin * limits[min(max(age, 1), len(limits)) - 1]

    def _weighed(self, step: int, weighed: Weighed) -> Decision:
        if weighed.thresholds is None:
            return weighed.decision(Action.EVALUATE, "evaluating pays in any case")
        if weighed.weight >= 1.0:
            return weighed.decision(Action.EVALUATE, "estimate above the allowance")
        if weighed.weight > 0.0:
            if self._gate.corrector is Corrector.PAPER:
                return weighed.decision(Action.CORRECT, "blended")
            if not self._plan.affords(step, weighed.estimate):
                return weighed.decision(Action.EVALUATE, "error budget spent")
        self._plan.spend(weighed.estimate)
        below = weighed.weight == 0.0
        return weighed.decision(
            Action.REUSE, "estimate below the allowance" if below else "deferred within the error budget"
        )

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        return self._plan.measures_error(step, span, history)

    def record_error(self, step: int, span: int, error: float) -> None:
        self._plan.record_error(step, error)

    @property
    def difficulty(self) -> float:
        """See `RequestPlan.difficulty`."""
        return self._plan.difficulty
