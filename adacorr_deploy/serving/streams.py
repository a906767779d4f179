"""Requests whose progress is fetched: what a streaming front end asks for, one message at a time.

A stream holds its latest state alone, so a slow reader skips messages and costs no memory. A reader that stops asking
loses its request.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.serving.engine import Ticket
from adacorr_deploy.serving.replies import Reply, Status
from adacorr_deploy.serving.results import ImagesOfLatents, event_tensor, image_tensors
from adacorr_deploy.serving.tensors import Tensors

LEASE_SECONDS: Final = 10.0  # without a question, after which the reader counts as gone
HEARTBEAT_SECONDS: Final = 0.25  # after which a question is answered though nothing happened: its reader may be gone


@dataclass(slots=True, kw_only=True)
class Stream:
    """The reply to one request, and the reader that may be waiting for its next message."""

    name: str
    outputs: tuple[str, ...]
    images: ImagesOfLatents
    ticket: Ticket | None = None
    _step: int = 0
    _steps: int = 0
    _rho: float = 0.0
    _preview: NDArray[np.float32] | None = None
    _final: Tensors | None = None
    _failure: tuple[Status, str] | None = None
    _waiting: tuple[Reply, int] | None = None  # who asked, and after which step
    _asked: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def progressed(self, step: int, steps: int, rho: float) -> None:
        with self._lock:
            self._step, self._steps, self._rho = step, steps, rho

    def previewed(self, step: int, latents: NDArray[np.float32]) -> None:
        with self._lock:
            self._preview = latents

    def send(self, tensors: Tensors) -> None:
        with self._lock:
            self._final = {**tensors, "event": event_tensor("result", {})}
            self._answer()

    def fail(self, status: Status, message: str) -> None:
        with self._lock:
            self._failure = (status, message)
            self._answer()

    def ask(self, reply: Reply, after_step: int) -> None:
        """Take a question: what is there once more than `after_step` steps are done? One at a time."""
        with self._lock:
            self._asked = time.monotonic()
            if self._waiting is not None:
                reply.fail(Status.INVALID, f"stream {self.name} is being read by another request.")
                return
            self._waiting = (reply, after_step)

    def answer(self) -> None:
        """Answer the question that waits, if there is news for it. Makes images: not for the engine's own thread."""
        with self._lock:
            self._answer()

    def beat(self, now: float) -> bool:
        """Say whether a question has waited for long; then the next `answer` answers it without news too."""
        with self._lock:
            waits = self._waiting is not None and now - self._asked > HEARTBEAT_SECONDS
            if waits and self._waiting is not None:
                self._waiting = (self._waiting[0], -1)
            return waits

    def is_cancelled(self) -> bool:
        """Say whether its reader has stopped asking."""
        return self._waiting is None and time.monotonic() - self._asked > LEASE_SECONDS

    @property
    def is_read(self) -> bool:
        """Whether its end was told, so that it can be forgotten."""
        return self._waiting is None and self._told

    _told: bool = False

    def _answer(self) -> None:
        if self._waiting is None:
            return
        reply, after_step = self._waiting
        if self._failure is not None:
            self._waiting, self._told = None, True
            reply.fail(*self._failure)
        elif self._final is not None:
            self._waiting, self._told = None, True
            reply.send(self._final)
        elif self._step > after_step:
            self._waiting = None
            reply.send(self._message())

    def _message(self) -> Tensors:
        preview, self._preview = self._preview, None
        values = {"step": self._step, "steps": self._steps, "rho": self._rho}
        images = image_tensors(preview, self.outputs, self.images) if preview is not None else {}
        return {**images, "event": event_tensor("progress", values)}
