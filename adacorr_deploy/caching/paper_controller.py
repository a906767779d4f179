"""The paper's policies, `paper-exact` and `paper-lazy`: score, weight and blend of arXiv 2602.13357."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adacorr_deploy.caching.decisions import (
    Action,
    Decision,
    Measured,
    Observation,
    Prediction,
    SlotHistory,
    Span,
)
from adacorr_deploy.caching.gates.adacorrection import PaperGate
from adacorr_deploy.caching.guards import NOT_FINITE, doubtful
from adacorr_deploy.caching.paper_correction import PAPER_OBSERVATION, paper_decision
from adacorr_deploy.caching.policy_controller import PolicyController
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.run import Run


class PaperController(PolicyController):
    """The paper's score, weight and blend; with `lazy`, a block whose weight is at most ε is not launched."""

    def __init__(
        self, policy: Policy, gate: PaperGate, run: Run, spans: tuple[Span, ...], floors: Sequence[float] | None
    ) -> None:
        super().__init__(policy, run, spans)
        self._gate = gate
        self._floors = floors

    def observations(self, span: int) -> Sequence[Observation]:
        return (PAPER_OBSERVATION,)

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> Sequence[bool]:
        return (self._guard(step, span, history) is None,)

    def decide(self, step: int, span: int, history: SlotHistory, signals: Measured) -> Decision:
        guard, seen = self._guard(step, span, history), signals[0]
        if guard or seen is None or doubtful(seen):
            return Decision(action=Action.EVALUATE, reason=guard or NOT_FINITE)
        return paper_decision(self._gate, self._floors[span] if self._floors is not None else 0.0, seen)

    def prediction(self, step: int, span: int, history: SlotHistory) -> Prediction:
        return replace(super().prediction(step, span, history), onto_kept_input=True)
