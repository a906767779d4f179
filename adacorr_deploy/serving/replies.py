"""What a request comes with and how it is answered, whatever server stands in front."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.policy import UNCALIBRATED, Policy
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


def for_a_client(policy: Policy, request: SampleRequest, held: Sequence[Calibration]) -> str:
    """Return what a client is told whose policy needs a calibration that the server doesn't hold: what it may ask."""
    asked = _run_label(request.sampler.value, request.steps, request.guidance)
    of_policy = [each.key for each in held if not policy.needs_costs or each.predictor == policy.predictor]
    runs = dict.fromkeys(_run_label(key.sampler, key.steps, key.guidance) for key in of_policy)
    runs.pop(asked, None)  # measured, but for other spans, or without the profile that the policy looks up
    instead = f"Ask for a run that it is calibrated for ({'; '.join(runs)}), or" if runs else "Ask"
    return (
        f"policy {policy.name} needs a calibration that this server doesn't hold for {asked}. {instead} for a policy "
        f"that needs none: {UNCALIBRATED}, or quality exact."
    )


def _run_label(sampler: str, steps: int, guidance: float) -> str:
    return f"{sampler} with {steps} steps and guidance {guidance:g}"


def status_of(error: AdaCorrError) -> Status:
    """Return the code that tells a client of an error."""
    return _CODES[outcome_of(error)]
