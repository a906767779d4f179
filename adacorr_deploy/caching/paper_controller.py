"""The paper's policies, `paper-exact` and `paper-lazy`: score, weight and blend of arXiv 2602.13357."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adacorr_deploy.caching.decisions import (
    Action,
    Decision,
    Observation,
    Observed,
    Prediction,
    Signals,
    SlotHistory,
    Span,
)
from adacorr_deploy.caching.gates.adacorrection import PaperGate
from adacorr_deploy.caching.guards import NOT_FINITE, doubtful
from adacorr_deploy.caching.policy_controller import PolicyController
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.run import Run
from adacorr_deploy.caching.scores import paper_score, weight_from_estimate


class PaperController(PolicyController):
    """The paper's score, weight and blend; with `lazy`, a block whose weight is at most ε is not launched."""

    def __init__(
        self, policy: Policy, gate: PaperGate, run: Run, spans: tuple[Span, ...], floors: Sequence[float] | None
    ) -> None:
        super().__init__(policy, run, spans)
        self._gate = gate
        self._floors = floors

    def observation(self, span: int) -> Observation | None:
        return Observation(what=Observed.INPUT)

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> bool:
        return self._guard(step, span, history) is None

    def decide(self, step: int, span: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        guard = self._guard(step, span, history)
        if guard or signals is None or doubtful(signals):
            return Decision(action=Action.EVALUATE, reason=guard or NOT_FINITE)
        score = max(paper_score(branch, self._gate.lambda_) for branch in signals)
        floor = self._floors[span] if self._floors is not None else 0.0
        thresholds = (floor, floor + 1.0, self._gate.gamma)
        weight = weight_from_estimate(score, thresholds)
        action, reason = Action.CORRECT, "weight above epsilon" if self._gate.lazy else "paper: always evaluated"
        if self._gate.lazy and weight <= self._gate.epsilon:
            action, reason = Action.REUSE, "weight within epsilon"
        elif self._gate.lazy and weight == 1.0:
            action = Action.EVALUATE
        return Decision(action=action, reason=reason, score=score, weight=weight, thresholds=thresholds)

    def prediction(self, step: int, span: int, history: SlotHistory) -> Prediction:
        return replace(super().prediction(step, span, history), onto_kept_input=True)
