"""Errors that a user can act on: each says what happened, what was given, what is allowed and what to do next."""

from __future__ import annotations


class AdaCorrError(Exception):
    """Base of every error that a command maps to one line and exit code 2."""


class CheckpointError(AdaCorrError):
    """A checkpoint is missing, truncated, unsafe, or does not hold the weights that its model needs."""


class UnsupportedModelError(AdaCorrError):
    """No exporter knows the model, or the model uses a feature that has no compiled form."""


class SchedulerError(AdaCorrError):
    """A scheduler configuration can't be written as a sampler table."""


class BundleError(AdaCorrError):
    """A bundle is incomplete, altered, of another schema version, or names files outside itself."""


class EngineError(AdaCorrError):
    """An engine could not be built, opened or run."""


class BackendUnavailableError(EngineError):
    """The packages or the hardware that a backend needs are not on this machine."""


class PolicyError(AdaCorrError):
    """A policy's name, file or parameter is not valid."""


class CalibrationError(AdaCorrError):
    """A policy needs a calibration that is missing or was made for another model, sampler, steps or guidance."""


class RequestError(AdaCorrError):
    """A sampling request is out of range: labels, steps, guidance, latents."""


class OutputError(AdaCorrError):
    """A result could not be written: the folder exists, is read-only, or its disk is full."""


class SamplingCancelledError(AdaCorrError):
    """The caller cancelled the request between two parts. Nothing of it is kept."""


class DeadlineExceededError(AdaCorrError):
    """A request's deadline passed before it was finished. Nothing of it is kept."""


class QueueFullError(AdaCorrError):
    """The queue takes no further request now."""

    def __init__(self, message: str, *, depth: int = 0) -> None:
        """Take the message, and how many requests wait."""
        super().__init__(message)
        self.depth = depth

    @classmethod
    def at(cls, depth: int) -> QueueFullError:
        """Return the error of a queue of which so many requests are all that it takes."""
        message = f"{depth} requests are waiting already, as many as the queue takes. Try again later."
        return cls(message, depth=depth)


class ClosedError(AdaCorrError):
    """What should serve a request was closed before or while it ran."""
