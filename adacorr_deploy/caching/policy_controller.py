"""What the controllers of all policies have in common: spans, guards, and the policy's predictor."""

from __future__ import annotations

from collections.abc import Sequence

from adacorr_deploy.caching.decisions import Affine, Prediction, Signals, SlotHistory, Span
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.caching.run import Run


class PolicyController:
    """The part of `decisions.Controller` that does not decide; the defaults measure neither errors nor changes."""

    def __init__(self, policy: Policy, run: Run, spans: tuple[Span, ...]) -> None:
        """Begin one request.

        Args:
            policy: Gives guards and predictor.
            run: The request.
            spans: The policy's division of its block parts.
        """
        self._policy = policy
        self._run = run
        self._spans = spans

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def lags(self) -> bool:
        return self._run.lags

    @property
    def revision(self) -> Revision:
        return self._policy.revision

    def affine(self, span: int) -> Affine | None:
        return None

    def prediction(self, step: int, span: int, history: SlotHistory) -> Prediction:
        return self._policy.predictor.prediction(step, history.steps)

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_error(self, step: int, span: int, error: float) -> None:
        raise AssertionError(f"{type(self).__name__} measures no errors")

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    @property
    def observes_motion(self) -> bool:
        return False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        raise AssertionError(f"{type(self).__name__} observes no changes")

    def _guard(self, step: int, span: int, history: SlotHistory) -> str | None:
        """Return why a span must be evaluated, or None if the gate may decide."""
        parts, age = self._spans[span].parts, history.age(step)
        return self._policy.guards.reason(step=step, steps=self._run.steps, age=age, parts=parts)
