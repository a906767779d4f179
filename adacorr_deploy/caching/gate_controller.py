"""The controller of every published method: guards, then the gate's rule, then AdaCorrection where it stands on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adacorr_deploy.caching.correction import OnTop
from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Decision,
    Observation,
    Prediction,
    Signals,
    SlotHistory,
    Span,
    SpanCache,
)
from adacorr_deploy.caching.gates.rule import Rule
from adacorr_deploy.caching.guards import NOT_FINITE, doubtful
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.run import Run


@dataclass(slots=True)
class GateController:
    """Decides for one request.

    Attributes:
        policy: Gives guards and predictor.
        run: The request.
        spans: The division.
        rule: The gate's, fresh.
        correction: AdaCorrection on top, fresh; None for none.
        affines: Of `affine` predictors, a map per span.
    """

    policy: Policy
    run: Run
    spans: tuple[Span, ...]
    rule: Rule
    correction: OnTop | None = None
    affines: Sequence[Affine | None] = ()

    @property
    def lags(self) -> bool:
        return self.run.lags

    def observation(self, span: int) -> Observation | None:
        return self.rule.observation(span) if self._caches(span) else None

    def affine(self, span: int) -> Affine | None:
        return self.affines[span] if self.affines else None

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> bool:
        if self.observation(span) is None:
            return False
        return self.rule.observes_under_guards or self._guard(step, span, history) is None

    def decide(self, step: int, span: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        if not self._caches(span):
            return Decision(action=Action.EVALUATE, reason="always evaluated")
        if signals is not None:
            self.rule.see(step, span, signals)
        decision = self._decided(step, span, history, signals)
        self.rule.settle(step, span, evaluated=decision.action is not Action.REUSE)
        return decision

    def _decided(self, step: int, span: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        guard = self._guard(step, span, history)
        if guard is not None:
            planned = self.rule.proposal(step, span, history) if self.rule.planned else None
            if planned is not None and planned.action is Action.EVALUATE:
                return planned  # the better reason of the two
            return Decision(action=Action.EVALUATE, reason=guard)
        if (signals is None and self.rule.observation(span) is not None) or doubtful(signals):
            return Decision(action=Action.EVALUATE, reason=NOT_FINITE)
        proposal = self.rule.proposal(step, span, history)
        if self.correction is None:
            return proposal
        return self.correction.decision(step, span, history, proposal)

    def prediction(self, step: int, span: int, history: SlotHistory) -> Prediction:
        return self.policy.predictor.prediction(step, history.steps)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        if self.correction is None or not self._caches(span):
            return False
        return self.correction.measures_error(step, span, history, needed=min(2, self.policy.predictor.history))

    def record_error(self, step: int, span: int, error: float) -> None:
        if self.correction is None:
            raise AssertionError("only AdaCorrection measures errors")
        self.correction.record_error(step, error)

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return self._caches(span) and self.rule.observes_change(step, span)

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self.rule.record_change(step, span, signals)

    def _caches(self, span: int) -> bool:
        return self.spans[span].cache is not SpanCache.NONE

    def _guard(self, step: int, span: int, history: SlotHistory) -> str | None:
        parts, guards = self.spans[span].parts, self.policy.guards
        return guards.step_reason(step=step, steps=self.run.steps, age=history.age(step)) or (
            "protected block" if guards.protected_blocks.intersection(parts) else None
        )
