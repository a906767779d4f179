"""Step-level continuous batching: requests of any steps, policies and arrival times share block launches.

Each request runs its own loop in its own workspace, and stops where it wants blocks evaluated. A sweep passes over the
blocks again and again, and at each evaluates all rows that wait there, in launches of bucket sizes. Whoever reuses a
block is not in its launch, and waits at a later one; a new request boards when the sweep comes to its first block. So
nobody waits longer than one pass, and rows meet although their steps differ.

A request's result is the same, bit for bit, alone and among any neighbours: all that it reads is its own, a row's
arithmetic does not depend on the other rows, and buckets in which it would are left out (`batch_buckets`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.core.errors import AdaCorrError, ClosedError, QueueFullError, RequestError
from adacorr_deploy.runtime.active_run import ActiveRun
from adacorr_deploy.runtime.batch_buckets import Buckets
from adacorr_deploy.runtime.batch_stats import Counts, EngineStats
from adacorr_deploy.runtime.batch_ticket import Listeners, Outcome, Ticket, as_adacorr_error
from adacorr_deploy.runtime.denoise import Progress
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.planned_run import PlannedRun
from adacorr_deploy.runtime.request import SampleRequest, check_integer
from adacorr_deploy.runtime.sampling import planned_with_policy
from adacorr_deploy.runtime.shared_blocks import Seat, SharedBlocks
from adacorr_deploy.runtime.workspace_pool import WorkspacePool

DEFAULT_BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24)  # rows: an image has two with guidance, else one
DRAIN_SECONDS: Final = 30.0
IDLE_BYTES: Final = 512 << 20
_MAX_NUMBER: Final = 1_000_000
_LOG = logging.getLogger(__name__)


class BatchingEngine:
    """Serves many requests at once over one pipeline, in a thread of its own. Use it as a context manager.

    It holds the pipeline from its making until it is closed; close the engine first.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        max_queue: int = 64,
        max_active_rows: int | None = None,
        idle_bytes: int = IDLE_BYTES,
    ) -> None:
        """Hold the pipeline, try the buckets, and start the thread.

        Args:
            pipeline: An open bundle that nobody else samples from meanwhile.
            buckets: Rows that a launch may have, ascending or not.
            max_queue: Requests that may wait; one more is refused.
            max_active_rows: Rows of the requests that run at the same time; one request alone may have more. More fill
                launches when some requests reuse, but each then takes longer. By default twice the largest bucket.
            idle_bytes: Of workspaces that are kept for the next requests of the same sizes.

        Raises:
            RequestError: If a number is out of range, or the engines were not compiled for any of the buckets.
            EngineError: If the pipeline is busy or closed, an engine fails, or there is no memory.
        """
        check_integer("max_queue", max_queue, 1, _MAX_NUMBER)
        if max_active_rows is not None:
            check_integer("max_active_rows", max_active_rows, 1, _MAX_NUMBER)
        self._pipeline = pipeline
        self._max_queue = max_queue
        with ExitStack() as resources:
            resources.enter_context(pipeline.exclusive())
            self._shared = SharedBlocks(pipeline, buckets)
            self._resources = resources.pop_all()
        self._max_active_rows = 2 * self.buckets.largest if max_active_rows is None else max_active_rows
        self._pool = WorkspacePool(pipeline, idle_bytes=idle_bytes)
        self._sweep = Sweep(len(pipeline.manifest.model.units))
        self._queue: deque[Ticket] = deque()
        self._active: list[ActiveRun] = []  # in order of admission; written by the thread alone, under the lock
        self._counts = Counts()
        self._lock = threading.Condition()
        self._drain_until: float | None = None  # when closing
        self._thread = threading.Thread(target=self._serve, name="adacorr-batching", daemon=True)
        self._thread.start()

    @property
    def buckets(self) -> Buckets:
        """The buckets that are used: of those asked for, the ones in which a row has the same result."""
        return self._shared.buckets

    # --- Callers' side -------------------------------------------------------------------------------------------

    def submit(
        self,
        request: SampleRequest,
        policy: Policy,
        *,
        on_done: Callable[[Outcome], None],
        deadline: float | None = None,
        on_step: Progress | None = None,
        preview_every: int = 0,
        on_preview: Callable[[int, NDArray[np.float32]], None] | None = None,
    ) -> Ticket:
        """Queue a request; any thread may.

        Args:
            request: What to sample; its images share its decisions, as in `sample_with_policy`.
            policy: See `caching.policy`.
            on_done: See `Listeners`, as for the others.
            deadline: On `time.monotonic()`'s clock; a request that has not ended by then ends with an error.
            on_step: See `Listeners`.
            preview_every: See `Listeners`.
            on_preview: See `Listeners`.

        Raises:
            QueueFullError: If as many requests wait as may.
            ClosedError: If the engine was closed.
            CalibrationError: If the policy needs a calibration that the bundle doesn't hold for this run.
            PolicyError: If the policy can't be run on this bundle.
            RequestError: If the request is out of range.
        """
        self._refuse_if_closed_or_full()  # before the work of planning
        run = planned_with_policy(self._pipeline, request, policy)
        listeners = Listeners(on_done=on_done, on_step=on_step, preview_every=preview_every, on_preview=on_preview)
        return self.submit_planned(run, listeners, asked_steps=request.steps, deadline=deadline)

    def submit_planned(
        self, run: PlannedRun, listeners: Listeners, *, asked_steps: int | None = None, deadline: float | None = None
    ) -> Ticket:
        """Queue a planned run, under any controller; errors as those of `submit`."""
        if deadline is not None and not np.isfinite(deadline):
            raise RequestError(f"deadline is {deadline}, allowed is a time on time.monotonic()'s clock, or None.")
        asked = run.request.steps if asked_steps is None else asked_steps
        ticket = Ticket(run=run, asked_steps=asked, deadline=deadline, listeners=listeners)
        with self._lock:
            self._refuse_if_closed_or_full()
            self._queue.append(ticket)
            self._lock.notify()
        return ticket

    def stats(self) -> EngineStats:
        """Return what the engine does now, and what it did so far."""
        with self._lock:
            return self._counts.snapshot(
                queue_depth=len(self._queue), active=self._active, slot_bytes=self._pool.lent_bytes
            )

    def close(self, *, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Take no further request, finish those that are here, and end with an error those that take too long.

        Returns once the thread has ended, at most one block launch after `drain_seconds`, 0 of which end all at once.
        A second call may shorten the time.
        """
        with self._lock:
            until = time.monotonic() + drain_seconds
            self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
            self._lock.notify()
        self._thread.join()
        self._resources.close()

    def __enter__(self) -> BatchingEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain_seconds=DRAIN_SECONDS if kind is None else 0.0)

    def _refuse_if_closed_or_full(self) -> None:
        with self._lock:
            if self._drain_until is not None or not self._thread.is_alive():
                raise ClosedError("This batching engine was closed. Make another one over the pipeline.")
            if len(self._queue) >= self._max_queue:
                raise QueueFullError(len(self._queue))

    # --- The thread's side ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve until closed. Whatever happens, every request gets its outcome."""
        reason: AdaCorrError = ClosedError("The batching engine was closed before the request had ended. Try again.")
        try:
            while self._wait_for_work():
                self._end_those_that_must_stop()
                self._admit()
                self._serve_block()
        except Exception as error:  # noqa: BLE001 (no caller may wait for ever)
            _LOG.exception("the batching engine's thread failed")
            reason = as_adacorr_error(error)
        finally:
            self._abort(reason)
            self._pool.clear()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; return False when there never will be, or the time to drain is over."""
        with self._lock:
            while not (self._queue or self._active or self._drain_until is not None):
                self._lock.wait()
            if self._drain_until is None:
                return True
            return bool(self._queue or self._active) and time.monotonic() < self._drain_until

    def _end_those_that_must_stop(self) -> None:
        for run in self._active:
            if (error := run.ticket.reason_to_stop()) is not None:
                run.fail(error)
        self._settle()
        for ticket in [*self._queue]:  # a copy: callers append meanwhile
            if (error := ticket.reason_to_stop()) is not None:
                with self._lock:
                    self._queue.remove(ticket)
                self._deliver(ticket, ticket.end(None, error))

    def _admit(self) -> None:
        """Start those who wait, in their order, while there is room; a large one waits until it has all of it."""
        while (ticket := self._next_admitted()) is not None:
            run = ActiveRun(ticket)
            with self._lock:
                self._active.append(run)
            run.start(self._pool)
            self._settle()

    def _next_admitted(self) -> Ticket | None:
        with self._lock:
            rows = sum(run.ticket.rows for run in self._active)
            if not self._queue or (rows and rows + self._queue[0].rows > self._max_active_rows):
                return None
            return self._queue.popleft()

    def _serve_block(self) -> None:
        """Evaluate the block that the sweep comes to next, for all who wait there now."""
        block, waiting = self._sweep.next_stop(self._active)
        while waiting:
            bucket = self.buckets.deal(sum(run.rows_waiting for run in waiting))[0]
            seated = [*_seats(waiting, bucket)]
            waiting = [run for run in waiting if run.rows_waiting]  # not yet, or not all of them
            self._launch(block, [run for run, _ in seated], [seat for _, seat in seated], bucket)
            self._end_those_that_must_stop()
            waiting = [run for run in waiting if not run.ended]

    def _launch(self, block: int, runs: Sequence[ActiveRun], seats: Sequence[Seat], bucket: int) -> None:
        """Evaluate a block for some rows. If the engine fails, it fails for these requests alone."""
        try:
            self._shared.run(block, seats, bucket=bucket)
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends these requests and no other)
            for run in runs:
                run.fail(as_adacorr_error(error))
        else:
            with self._lock:
                self._counts.launched(rows=sum(seat.rows for seat in seats), bucket=bucket)
            for run in runs:
                run.evaluated()
        self._settle()

    def _settle(self) -> None:
        """Part with those who have ended: their workspaces are back already."""
        ended = [run for run in self._active if run.ended]
        if not ended:
            return
        with self._lock:
            self._active = [run for run in self._active if not run.ended]
        for run in ended:
            self._deliver(run.ticket, run.ticket.end(run.result, run.error))

    def _deliver(self, ticket: Ticket, outcome: Outcome) -> None:
        with self._lock:
            self._counts.finished[outcome.ending] += 1
            if outcome.result is not None:
                self._counts.count(outcome.result.trace)
        ticket.deliver(outcome)

    def _abort(self, error: AdaCorrError) -> None:
        with self._lock:
            self._drain_until = time.monotonic()  # no further request
            tickets = [*self._queue]
            self._queue.clear()
        for run in self._active:
            if not run.ended:
                run.fail(error)
        self._settle()
        for ticket in tickets:
            self._deliver(ticket, ticket.end(None, error))


class Sweep:
    """Passes over the blocks in order, again and again, and stops where somebody waits."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._next = 0

    def next_stop(self, runs: Sequence[ActiveRun]) -> tuple[int, list[ActiveRun]]:
        """Return the next block at which somebody waits, and all who do, the oldest first.

        Who comes to the block later waits for the next pass: else those who always come back would hold the sweep.
        """
        if not runs:
            return self._next, []
        block = min((run.block for run in runs), key=lambda block: (block - self._next) % self._blocks)
        self._next = (block + 1) % self._blocks
        return block, [run for run in runs if run.block == block]


def _seats(runs: Sequence[ActiveRun], rows: int) -> Iterator[tuple[ActiveRun, Seat]]:
    """Seat the runs, in their order, until so many rows are taken; one may be seated in part."""
    for run in runs:
        if not rows:
            return
        seat = run.seat(rows)
        rows -= seat.rows
        yield run, seat
