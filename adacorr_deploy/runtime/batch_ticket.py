"""What a caller of the batching engine holds and gets: a ticket, and in the end an outcome."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import (
    AdaCorrError,
    ClosedError,
    DeadlineExceededError,
    EngineError,
    SamplingCancelledError,
)
from adacorr_deploy.runtime.denoise import Progress
from adacorr_deploy.runtime.pipeline import SampleResult
from adacorr_deploy.runtime.planned_run import PlannedRun

_LOG = logging.getLogger(__name__)


class Ending(str, Enum):
    """How a request ended."""

    DONE = "done"
    CANCELLED = "cancelled"
    EXPIRED = "expired"  # its deadline passed
    FAILED = "failed"  # an engine, its numbers or its callback
    ABORTED = "aborted"  # the engine was closed


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a request: a result or an error, never both."""

    result: SampleResult | None
    error: AdaCorrError | None
    queue_seconds: float  # from `submit` to its first launch, or to its end if it never ran
    seconds: float  # from `submit` to its end

    @property
    def ending(self) -> Ending:
        match self.error:
            case None:
                return Ending.DONE
            case SamplingCancelledError():
                return Ending.CANCELLED
            case DeadlineExceededError():
                return Ending.EXPIRED
            case ClosedError():
                return Ending.ABORTED
            case _:
                return Ending.FAILED


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """What is called for a request, in a thread of the engine: all requests wait for it, so it should only hand over.

    It may submit and cancel, but not close the engine.

    Attributes:
        on_done: Once, with the outcome, when the request's slots are free again; perhaps before `submit` has returned.
        on_step: After each step: finished steps, all steps, and the share of block launches skipped so far.
        preview_every: Steps between previews; 0 for none.
        on_preview: Finished steps, and a copy of the latents that the last of them made, (B, C, H, W).
    """

    on_done: Callable[[Outcome], None]
    on_step: Progress | None = None
    preview_every: int = 0
    on_preview: Callable[[int, NDArray[np.float32]], None] | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Stoppable:
    """A request that can be cancelled, or be too late. Times are on `time.monotonic()`'s clock."""

    deadline: float | None
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    was_cancelled: bool = False

    def cancel(self) -> None:
        """End the request within one block launch, unless it has ended; `on_done` is called all the same."""
        self.was_cancelled = True

    def reason_to_stop(self) -> AdaCorrError | None:
        """Return why the request must not go on now, or None."""
        if self.was_cancelled:
            return SamplingCancelledError("The request was cancelled; nothing of it was kept.")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            waited = "while it waited" if self.started is None else "while it ran"
            late = f"{time.monotonic() - self.submitted:.3f} s after it was submitted, {waited}"
            return DeadlineExceededError(f"The request's deadline passed {late}. Allow more time, or try again later.")
        return None


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket(Stoppable):
    """A request in the engine's hands."""

    run: PlannedRun
    asked_steps: int  # by the caller; `fewer-steps` takes fewer
    listeners: Listeners

    @property
    def rows(self) -> int:
        return self.run.size.rows

    def end(self, result: SampleResult | None, error: AdaCorrError | None) -> Outcome:
        """Return the outcome at this moment."""
        now = time.monotonic()
        queued_until = now if self.started is None else self.started
        return Outcome(
            result=result, error=error, queue_seconds=queued_until - self.submitted, seconds=now - self.submitted
        )

    def deliver(self, outcome: Outcome) -> None:
        """Call `on_done`. What it raises is logged: no other request may suffer from it."""
        try:
            self.listeners.on_done(outcome)
        except Exception:  # noqa: BLE001 (a listener may raise anything)
            _LOG.exception("on_done of a request raised; its outcome was %s", outcome.ending.value)


def as_adacorr_error(error: BaseException) -> AdaCorrError:
    """Return an error as one of our own, for an outcome."""
    if isinstance(error, AdaCorrError):
        return error
    wrapped = EngineError(f"The request failed by {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
