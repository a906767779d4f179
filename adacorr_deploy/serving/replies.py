"""What a request comes with and how it is answered, whatever server stands in front."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from adacorr_deploy.caching.calibration import CalibrationKey
from adacorr_deploy.caching.policy import UNCALIBRATED
from adacorr_deploy.core.errors import (
    AdaCorrError,
    CalibrationError,
    ClosedError,
    DeadlineExceededError,
    PolicyError,
    QueueFullError,
    RequestError,
    SamplingCancelledError,
)
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.serving.metrics import Outcome
from adacorr_deploy.serving.tensors import Tensors


class Status(str, Enum):
    """Codes that inference servers know."""

    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


_CODES: Final = {
    Outcome.REFUSED: Status.INVALID,
    Outcome.REJECTED: Status.UNAVAILABLE,
    Outcome.CANCELLED: Status.CANCELLED,
    Outcome.TIMED_OUT: Status.CANCELLED,
    Outcome.FAILED: Status.INTERNAL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A request as the server hands it over.

    Attributes:
        request_id: The client's, or one made for it.
        tensors: Reads the inputs.
        parameters: Further keys that the client sent.
        wanted: Names of the outputs that it asked for; all where it named none.
        traceparent: The span that it belongs to, in W3C's form; None where nobody traces it.
    """

    request_id: str
    tensors: Callable[[], Tensors]
    parameters: Mapping[str, str | int | float | bool]
    wanted: frozenset[str]
    traceparent: str | None = None


class Reply(Protocol):
    """The way back to one client: one answer, from any thread."""

    def send(self, tensors: Tensors) -> None: ...

    def fail(self, status: Status, message: str) -> None: ...

    def is_cancelled(self) -> bool:
        """Say whether the client cancelled or has gone; not to be asked after the answer."""
        ...


class GuardedReply:
    """A reply that can be asked at any time whether its client has gone."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._answered = False
        self._lock = threading.Lock()

    def send(self, tensors: Tensors) -> None:
        with self._lock:
            self._answered = True
            self._reply.send(tensors)

    def fail(self, status: Status, message: str) -> None:
        with self._lock:
            self._answered = True
            self._reply.fail(status, message)

    def is_cancelled(self) -> bool:
        """Say whether the client cancelled or has gone before it got its answer."""
        with self._lock:
            return not self._answered and self._reply.is_cancelled()


def outcome_of(error: AdaCorrError) -> Outcome:
    """Return how a request ends that raised an error."""
    match error:
        case RequestError() | PolicyError() | CalibrationError():
            return Outcome.REFUSED
        case QueueFullError() | ClosedError():
            return Outcome.REJECTED
        case SamplingCancelledError():
            return Outcome.CANCELLED
        case DeadlineExceededError():
            return Outcome.TIMED_OUT
        case _:
            return Outcome.FAILED


def for_a_client(policy: str, request: SampleRequest, runs: Sequence[CalibrationKey]) -> str:
    """Return what a client is told whose policy needs a calibration that the server doesn't hold: what it may ask."""
    held = dict.fromkeys(f"{run.sampler} with {run.steps} steps and guidance {run.guidance:g}" for run in runs)
    instead = f"Ask for a run that it is calibrated for ({'; '.join(held)}), or" if held else "It holds none. Ask"
    return (
        f"policy {policy} needs a calibration that this server doesn't hold for {request.sampler.value} with "
        f"{request.steps} steps and guidance {request.guidance:g}. {instead} for a policy that needs none: "
        f"{UNCALIBRATED}, or quality exact."
    )


def status_of(error: AdaCorrError) -> Status:
    """Return the code that tells a client of an error."""
    return _CODES[outcome_of(error)]
