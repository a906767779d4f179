"""Where prompts become embeddings before their requests go to the engine, in a thread of its own.

A text encoder can take as long as sampling. So neither the server's thread nor the engine's waits for it, and what
waits here has a deadline, can be cancelled and counts against the queue, as in the engine's own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from adacorr_deploy.core.errors import AdaCorrError, ClosedError, QueueFullError
from adacorr_deploy.runtime import Prompts, SampleResult
from adacorr_deploy.runtime.batch_ticket import Stoppable, as_adacorr_error
from adacorr_deploy.serving.engine import Finished, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Prompts that are still to be encoded: one per image, and one negative for each or for all, or none."""

    prompts: tuple[str, ...]
    negative: tuple[str, ...] = ()


class Encode(Protocol):
    """Turns texts into embeddings; called from one thread. `cancelled` is asked before each of them."""

    def __call__(
        self, prompts: Sequence[str], negative: Sequence[str] = (), *, cancelled: Callable[[], bool] | None = None
    ) -> Prompts: ...


OnDone = Callable[[Finished], None]
HandOver = Callable[[Prompts, OnDone], Ticket]  # to the engine; may raise what its `submit` raises


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a request ended, counted from its arrival here."""

    result: SampleResult | None
    error: AdaCorrError | None
    queue_seconds: float
    seconds: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting(Stoppable):
    """A request whose prompts are not encoded yet; later, a name for its ticket in the engine."""

    texts: Texts
    hand_over: HandOver
    on_done: OnDone
    _ticket: Ticket | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        """End the request, wherever it is."""
        with self._lock:
            Stoppable.cancel(self)
            ticket = self._ticket
        if ticket is not None:
            ticket.cancel()

    def go_on(self, prompts: Prompts) -> None:
        """Give the request to the engine."""
        waited = time.monotonic() - self.submitted

        def finished(found: Finished) -> None:
            self.on_done(
                Ended(
                    result=found.result,
                    error=found.error,
                    queue_seconds=waited + found.queue_seconds,
                    seconds=waited + found.seconds,
                )
            )

        ticket = self.hand_over(prompts, finished)
        with self._lock:
            self._ticket = ticket
            cancelled = self.was_cancelled
        if cancelled:
            ticket.cancel()

    def end(self, error: AdaCorrError) -> None:
        waited = time.monotonic() - self.submitted
        self.on_done(Ended(result=None, error=error, queue_seconds=waited, seconds=waited))


class PromptDesk:
    """Takes requests from any thread, and encodes their prompts one after the other."""

    def __init__(self, encode: Encode, *, max_queue: int, engine_depth: Callable[[], int]) -> None:
        """Start the thread.

        Args:
            encode: See `Encode`.
            max_queue: Requests that may wait, here and in the engine together.
            engine_depth: Says how many wait in the engine.
        """
        self._encode = encode
        self._max_queue = max_queue
        self._engine_depth = engine_depth
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="adacorr-prompts", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many requests wait here; the one whose prompts are being encoded is none of them."""
        return len(self._queue)

    def submit(self, texts: Texts, hand_over: HandOver, *, deadline: float | None, on_done: OnDone) -> Ticket:
        """Let a request wait for its embeddings; then `hand_over` is called, and in the end, once, `on_done`.

        Args:
            texts: What is encoded.
            hand_over: Gives the request to the engine, in the desk's thread.
            deadline: On `time.monotonic()`'s clock.
            on_done: Given the engine's outcome, or why it never came to the engine.

        Raises:
            QueueFullError: If as many requests wait as may.
            ClosedError: If the desk was closed.
        """
        waiting = _Waiting(texts=texts, hand_over=hand_over, on_done=on_done, deadline=deadline)
        with self._changed:
            if self._closed:
                raise _closed()
            depth = len(self._queue) + self._engine_depth()
            if depth >= self._max_queue:
                raise QueueFullError.at(depth)
            self._queue.append(waiting)
            self._changed.notify()
        return waiting

    def end_waiting(self) -> None:
        """End the requests that were cancelled, or whose deadline passed, while they waited."""
        with self._changed:
            overdue = [(each, error) for each in self._queue if (error := each.reason_to_stop()) is not None]
            for each, _ in overdue:
                self._queue.remove(each)
        for each, error in overdue:
            each.end(error)

    def close(self) -> None:
        """Take no further request, and end those that wait; the engine keeps what it was given."""
        with self._changed:
            self._closed = True
            left = [*self._queue]
            self._queue.clear()
            self._changed.notify()
        for each in left:
            each.end(_closed())
        self._thread.join()

    def _serve(self) -> None:
        while (waiting := self._next()) is not None:
            try:
                self._go_on(waiting)
            except Exception as error:  # noqa: BLE001 (whatever it is, it ends this request and no other)
                waiting.end(as_adacorr_error(error))

    def _next(self) -> _Waiting | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return self._queue.popleft() if self._queue else None

    def _go_on(self, waiting: _Waiting) -> None:
        def must_stop() -> bool:
            return self._closed or waiting.reason_to_stop() is not None

        if not must_stop():
            try:
                prompts = self._encode(waiting.texts.prompts, waiting.texts.negative, cancelled=must_stop)
            except AdaCorrError:
                if not must_stop():
                    raise
        if must_stop():
            waiting.end(waiting.reason_to_stop() or _closed())
        else:
            waiting.go_on(prompts)


def _closed() -> ClosedError:
    return ClosedError("The server is stopping, and takes no further request. Ask another one.")
