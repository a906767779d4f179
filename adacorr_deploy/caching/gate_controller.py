"""The controller of every published method: guards, then the gate's rule, then AdaCorrection where it stands on top."""

from __future__ import annotations

from collections.abc import Sequence

from adacorr_deploy.caching.correction import OnTop
from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Decision,
    Observation,
    Signals,
    SlotHistory,
    Span,
    SpanCache,
)
from adacorr_deploy.caching.gates.rule import Rule
from adacorr_deploy.caching.guards import NOT_FINITE, doubtful
from adacorr_deploy.caching.policy_controller import PolicyController
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.run import Run


class GateController(PolicyController):
    """Decides for one request."""

    def __init__(
        self,
        policy: Policy,
        run: Run,
        spans: tuple[Span, ...],
        rule: Rule,
        correction: OnTop | None = None,
        affines: Sequence[Affine | None] = (),
    ) -> None:
        """Begin one request.

        Args:
            policy: Gives guards and predictor.
            run: The request.
            spans: The policy's division of its block parts.
            rule: The gate's, fresh.
            correction: AdaCorrection on top, fresh; None for none.
            affines: Of `affine` predictors, a map per span.
        """
        super().__init__(policy, run, spans)
        self._rule = rule
        self._correction = correction
        self._affines = affines

    def observation(self, span: int) -> Observation | None:
        return self._rule.observation(span) if self._caches(span) else None

    def affine(self, span: int) -> Affine | None:
        return self._affines[span] if self._affines else None

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> bool:
        if self.observation(span) is None:
            return False
        return self._rule.observes_under_guards or self._guard(step, span, history) is None

    def decide(self, step: int, span: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        if not self._caches(span):
            return Decision(action=Action.EVALUATE, reason="always evaluated")
        if signals is not None:
            self._rule.see(step, span, signals)
        decision = self._decided(step, span, history, signals)
        self._rule.settle(step, span, evaluated=decision.action is not Action.REUSE)
        return decision

    def _decided(self, step: int, span: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        guard = self._guard(step, span, history)
        if guard is not None:
            planned = self._rule.proposal(step, span, history) if self._rule.planned else None
            if planned is not None and planned.action is Action.EVALUATE:
                return planned  # the better reason of the two
            return Decision(action=Action.EVALUATE, reason=guard)
        if (signals is None and self._rule.observation(span) is not None) or doubtful(signals):
            return Decision(action=Action.EVALUATE, reason=NOT_FINITE)
        proposal = self._rule.proposal(step, span, history)
        if self._correction is None:
            return proposal
        return self._correction.decision(step, span, history, proposal)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        if self._correction is None or not self._caches(span):
            return False
        return self._correction.measures_error(step, span, history, needed=min(2, self._policy.predictor.history))

    def record_error(self, step: int, span: int, error: float) -> None:
        if self._correction is None:
            raise AssertionError("only AdaCorrection measures errors")
        self._correction.record_error(step, error)

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return self._caches(span) and self._rule.observes_change(step, span)

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self._rule.record_change(step, span, signals)

    def _caches(self, span: int) -> bool:
        return self._spans[span].cache is not SpanCache.NONE
