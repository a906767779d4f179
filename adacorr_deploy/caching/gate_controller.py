"""The controller of every published method: guards, then the gate's rule, then AdaCorrection where it stands on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Decision,
    Measured,
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


class ProposalCorrection(Protocol):
    """AdaCorrection on top, for one request: `OnTop`, `PaperOnTop`."""

    @property
    def observation(self) -> Observation | None:
        """What it has watched of each span that keeps anything."""
        ...

    def decision(
        self, step: int, span: int, history: SlotHistory, proposal: Decision, signals: Sequence[Signals] | None
    ) -> Decision:
        """Return what is done with a span that no guard evaluates; `signals` are those of its observation."""
        ...

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        """Whether the span's prediction is compared with its evaluation."""
        ...

    def record_error(self, step: int, error: float) -> None:
        """Take that comparison."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """What is observed of a span, and which of it the rule and the correction ask for: they may share one."""

    observations: tuple[Observation, ...] = ()
    by_rule: int | None = None
    by_correction: int | None = None


class GateController(PolicyController):
    """Decides for one request."""

    def __init__(
        self,
        policy: Policy,
        run: Run,
        spans: tuple[Span, ...],
        rule: Rule,
        correction: ProposalCorrection | None = None,
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
        watched = correction.observation if correction is not None else None
        self._watched = [
            _watched(rule.observation(span), watched) if self._caches(span) else _Watched()
            for span in range(len(spans))
        ]

    def observations(self, span: int) -> Sequence[Observation]:
        return self._watched[span].observations

    def affine(self, span: int) -> Affine | None:
        return self._affines[span] if self._affines else None

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> Sequence[bool]:
        watched = self._watched[span]
        if not watched.observations:
            return ()
        free = self._guard(step, span, history) is None
        asking = {watched.by_rule} if free or self._rule.observes_under_guards else set()
        if free and watched.by_correction is not None and not self._planned_evaluation(step, span, history):
            asking.add(watched.by_correction)
        return [number in asking for number in range(len(watched.observations))]

    def _planned_evaluation(self, step: int, span: int, history: SlotHistory) -> bool:
        """Whether the rule is known to evaluate: then there is nothing to correct."""
        return self._rule.planned and self._rule.proposal(step, span, history).action is Action.EVALUATE

    def decide(self, step: int, span: int, history: SlotHistory, signals: Measured) -> Decision:
        if not self._caches(span):
            return Decision(action=Action.EVALUATE, reason="always evaluated")
        seen = _entry(signals, self._watched[span].by_rule)
        if seen is not None:
            self._rule.see(step, span, seen)
        decision = self._decided(step, span, history, signals)
        self._rule.settle(step, span, evaluated=decision.action is not Action.REUSE)
        return decision

    def _decided(self, step: int, span: int, history: SlotHistory, signals: Measured) -> Decision:
        guard = self._guard(step, span, history)
        if guard is not None:
            planned = self._rule.proposal(step, span, history) if self._rule.planned else None
            if planned is not None and planned.action is Action.EVALUATE:
                return planned  # the better reason of the two
            return Decision(action=Action.EVALUATE, reason=guard)
        watched = self._watched[span]
        seen = _entry(signals, watched.by_rule)
        if (seen is None and watched.by_rule is not None) or doubtful(seen):
            return Decision(action=Action.EVALUATE, reason=NOT_FINITE)
        proposal = self._rule.proposal(step, span, history)
        if self._correction is None:
            return proposal
        return self._correction.decision(step, span, history, proposal, _entry(signals, watched.by_correction))

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        return self._correction is not None and self._correction.measures_error(step, span, history)

    def record_error(self, step: int, span: int, error: float) -> None:
        if self._correction is None:
            raise AssertionError("only AdaCorrection measures errors")
        self._correction.record_error(step, error)

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return self._caches(span) and self._rule.observes_change(step, span)

    @property
    def observes_motion(self) -> bool:
        return self._rule.observes_motion

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self._rule.record_change(step, span, signals)

    def _caches(self, span: int) -> bool:
        return self._spans[span].cache is not SpanCache.NONE


def _watched(rule: Observation | None, correction: Observation | None) -> _Watched:
    observations = tuple(dict.fromkeys(each for each in (rule, correction) if each is not None))
    return _Watched(
        observations=observations,
        by_rule=None if rule is None else observations.index(rule),
        by_correction=None if correction is None else observations.index(correction),
    )


def _entry(signals: Measured, number: int | None) -> Sequence[Signals] | None:
    return None if number is None else signals[number]
