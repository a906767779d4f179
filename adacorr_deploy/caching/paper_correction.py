"""The paper's decision on a span; on top of a gate, whose reuses the paper's weight corrects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from adacorr_deploy.caching.decisions import Action, Decision, Observation, Observed, Signals, SlotHistory, Span
from adacorr_deploy.caching.gates.adacorrection import PaperEquations
from adacorr_deploy.caching.guards import NOT_FINITE, doubtful
from adacorr_deploy.caching.scores import paper_score, weight_from_estimate

PAPER_OBSERVATION: Final = Observation(what=Observed.INPUT)


def paper_decision(
    equations: PaperEquations, floor: float, signals: Sequence[Signals], *, reused: str = "weight within epsilon"
) -> Decision:
    """Decide by S, the larger of the branches', above the floor.

    Args:
        equations: γ, λ, ε, and whether anything may be reused at all.
        floor: What is subtracted from S, ≥ 0.
        signals: Of the span's input against that of its last evaluation, finite.
        reused: The reason of a reuse.
    """
    score = max(paper_score(branch, equations.lambda_) for branch in signals)
    thresholds = (floor, floor + 1.0, equations.gamma)
    weight = weight_from_estimate(score, thresholds)
    action, reason = Action.CORRECT, "weight above epsilon" if equations.is_lazy else "paper: always evaluated"
    if equations.is_lazy and weight <= equations.epsilon:
        action, reason = Action.REUSE, reused
    elif equations.is_lazy and weight == 1.0:
        action = Action.EVALUATE
    return Decision(action=action, reason=reason, score=score, weight=weight, thresholds=thresholds)


class PaperOnTop:
    """Corrects a gate's reuses by the paper's weight; its evaluations stand. It keeps no state of its own.

    A span's floor is that of its first block part, whose input is the span's.
    """

    observation: Observation | None = PAPER_OBSERVATION

    def __init__(self, equations: PaperEquations, spans: Sequence[Span], floors: Sequence[float] | None) -> None:
        self._equations = equations
        self._floors = [floors[span.first] if floors is not None else 0.0 for span in spans]

    def decision(
        self, step: int, span: int, history: SlotHistory, proposal: Decision, signals: Sequence[Signals] | None
    ) -> Decision:
        """Return what is done with a span that no guard evaluates."""
        if proposal.action is Action.EVALUATE:
            return proposal
        if signals is None or doubtful(signals):
            return Decision(action=Action.EVALUATE, reason=NOT_FINITE)
        return paper_decision(self._equations, self._floors[span], signals, reused=proposal.reason)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_error(self, step: int, error: float) -> None:
        raise AssertionError("the paper's corrections measure no error")
