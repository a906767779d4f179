"""The paper's policies, `paper-exact` and `paper-lazy`: score, weight and blend of arXiv 2602.13357."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
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
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.run import Run
from adacorr_deploy.caching.scores import paper_score, weight_from_estimate


class PaperController:
    """The paper's score, weight and blend; with `lazy`, a block whose weight is at most ε is not launched."""

    def __init__(
        self, policy: Policy, gate: PaperGate, run: Run, spans: tuple[Span, ...], floors: Sequence[float] | None
    ) -> None:
        self._policy = policy
        self._gate = gate
        self._run = run
        self._spans = spans
        self._floors = floors

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def lags(self) -> bool:
        return self._run.lags

    def observation(self, span: int) -> Observation | None:
        return Observation(what=Observed.INPUT)

    def affine(self, span: int) -> Affine | None:
        return None

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
        return replace(self._policy.predictor.prediction(step, history.steps), onto_kept_input=True)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_error(self, step: int, span: int, error: float) -> None:
        raise AssertionError("the paper's policies measure no error")

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        raise AssertionError("the paper's policies observe no change")

    def _guard(self, step: int, span: int, history: SlotHistory) -> str | None:
        return self._policy.guards.reason(step=step, steps=self._run.steps, block=span, age=history.age(step))
