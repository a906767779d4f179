"""AdaCorrection on top of a gate: the gate proposes, the calibrated weight decides (METHOD §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.decisions import Action, Decision, Observation, Signals, SlotHistory, Span, SpanCache
from adacorr_deploy.caching.difficulty import gap_of
from adacorr_deploy.caching.gates.adacorrection import Correction, Corrector
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.request_plan import RequestPlan, Weighed
from adacorr_deploy.caching.run import Run

_EVALUATED_KIND: Final = "mlp"  # of a block's units, by the cheap corrector


class OnTop:
    """Corrects a gate's proposals for one request.

    A span is weighed from its own state (steps between its last two evaluations, steps since); of several spans each
    spends its share of the estimate.
    """

    observation: Observation | None = None  # it goes by costs and errors

    def __init__(
        self, settings: Correction, guards: Guards, run: Run, spans: Sequence[Span], calibration: Calibration
    ) -> None:
        self._settings = settings
        self._spans = spans
        self._kinds = run.kinds
        self._plan = RequestPlan(settings, guards, spans, calibration)
        self._share = 1 / sum(span.cache is not SpanCache.NONE for span in spans)

    def decision(
        self, step: int, span: int, history: SlotHistory, proposal: Decision, signals: Sequence[Signals] | None
    ) -> Decision:
        """Return what is done with a span that no guard evaluates."""
        weighed = self._plan.weighed(step, gap_of(history), step - history.steps[0] - 1)
        if weighed.thresholds is None:
            return weighed.decision(Action.EVALUATE, "beyond what calibration allows")
        if weighed.weight >= 1.0:
            return weighed.decision(Action.EVALUATE, "estimate above the allowance")
        if weighed.weight == 0.0:
            return self._below(proposal, weighed)
        return self._between(step, span, proposal, weighed)

    def _below(self, proposal: Decision, weighed: Weighed) -> Decision:
        if proposal.action is Action.REUSE:
            return self._reuse(proposal.reason, weighed)
        if not self._settings.promote:
            return weighed.decision(Action.EVALUATE, proposal.reason)
        return self._reuse("promoted: estimate below the allowance", weighed)

    def _between(self, step: int, span: int, proposal: Decision, weighed: Weighed) -> Decision:
        if proposal.action is Action.EVALUATE:
            return weighed.decision(Action.EVALUATE, proposal.reason)
        if self._plan.affords(step, weighed.estimate * self._share):
            return self._reuse(proposal.reason, weighed)
        match self._settings.corrector:
            case Corrector.DEFER:
                return weighed.decision(Action.EVALUATE, "error budget spent")
            case Corrector.PAPER:
                return weighed.decision(Action.CORRECT, "blended")
            case Corrector.CHEAP:
                return self._cheap(span, weighed)

    def _cheap(self, span: int, weighed: Weighed) -> Decision:
        kind = self._kinds[self._spans[span].first]
        if kind != _EVALUATED_KIND:
            return self._reuse(f"{kind.replace('_', ' ')} half reused", weighed)
        return weighed.decision(Action.EVALUATE, "MLP half evaluated")

    def _reuse(self, reason: str, weighed: Weighed) -> Decision:
        self._plan.spend(weighed.estimate * self._share)
        return weighed.decision(Action.REUSE, reason)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        """Whether the span is the one whose errors tell the difficulty, with as many evaluations as that takes."""
        return self._plan.measures_error(step, span, history)

    def record_error(self, step: int, error: float) -> None:
        self._plan.record_error(step, error)
