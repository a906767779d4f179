"""The desk of the batching engine: where requests wait until a lane takes them, and where everything is counted."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from adacorr_deploy.caching.guards import TRIPS
from adacorr_deploy.core.errors import AdaCorrError, ClosedError, QueueFullError
from adacorr_deploy.runtime.batch_ticket import Ending, Outcome, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Counts are since the engine was made."""

    queue_depth: int
    active_requests: int
    active_rows: int
    slot_bytes: int  # of active requests' workspaces: slots, modulation tables and what stands between the blocks
    launches: int  # of blocks
    rows_used: int  # in those launches
    rows_launched: int  # in those launches, padding included
    block_evaluations: int  # (request, block, step)s that those launches served, of finished requests
    block_reuses: int  # (request, block, step)s that were not launched, of finished requests
    guard_trips: int  # steps at which a measurement overruled the policy's plan, of finished requests
    finished: Mapping[Ending, int]

    @property
    def occupancy(self) -> float:
        """Share of launched rows that were somebody's, 0 … 1; 1 before the first launch."""
        return self.rows_used / self.rows_launched if self.rows_launched else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneLoad:
    """What a lane has on its hands."""

    requests: int = 0
    rows: int = 0
    slot_bytes: int = 0


class Desk:
    """Takes requests from any thread, and gives each to the lane that has the least to do; a lock guards all of it."""

    def __init__(self, *, lanes: int, max_queue: int, max_lane_rows: int) -> None:
        self._max_queue = max_queue
        self._max_lane_rows = max_lane_rows
        self._lock = threading.Condition()
        self._queue: deque[Ticket] = deque()
        self._loads = [LaneLoad() for _ in range(lanes)]
        self._drain_until: float | None = None  # when closing
        self._launches = Counter[str]()
        self._traced = Counter[str]()
        self._finished = Counter[Ending]()

    # --- Callers' side -------------------------------------------------------------------------------------------

    def refuse_if_closed_or_full(self) -> None:
        """Raise what `put` would.

        Raises:
            ClosedError: If the engine was closed.
            QueueFullError: If as many requests wait as may.
        """
        with self._lock:
            if self._drain_until is not None:
                raise ClosedError("This batching engine was closed. Make another one over the pipeline.")
            if len(self._queue) >= self._max_queue:
                raise QueueFullError.at(len(self._queue))

    def put(self, ticket: Ticket) -> None:
        """Let a request wait; errors as those of `refuse_if_closed_or_full`."""
        with self._lock:
            self.refuse_if_closed_or_full()
            self._queue.append(ticket)
            self._lock.notify_all()

    def close(self, *, drain_seconds: float) -> None:
        """Take no further request, and end those that are here when the time is over; it never grows longer."""
        with self._lock:
            until = time.monotonic() + drain_seconds
            self._drain_until = until if self._drain_until is None else min(until, self._drain_until)
            self._lock.notify_all()

    def stats(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                queue_depth=len(self._queue),
                active_requests=sum(load.requests for load in self._loads),
                active_rows=sum(load.rows for load in self._loads),
                slot_bytes=sum(load.slot_bytes for load in self._loads),
                launches=self._launches["launches"],
                rows_used=self._launches["used"],
                rows_launched=self._launches["launched"],
                block_evaluations=self._traced["evaluations"],
                block_reuses=self._traced["reuses"],
                guard_trips=self._traced["trips"],
                finished={ending: self._finished[ending] for ending in Ending},
            )

    # --- Lanes' side ---------------------------------------------------------------------------------------------

    def wait_for_work(self, lane: int) -> bool:
        """Wait until a lane has something to do; return False when it never will, or the time to drain is over."""
        with self._lock:
            while True:
                left = None if self._drain_until is None else self._drain_until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if self._loads[lane].requests or self._next(lane) is not None:
                    return True
                if left is not None and not self._queue:
                    return False
                self._lock.wait(left)

    def take(self, lane: int) -> Ticket | None:
        """Return the oldest request if this lane is the one to have it: the least loaded, with room for its rows."""
        with self._lock:
            if (ticket := self._next(lane)) is None:
                return None
            self._queue.popleft()
            load = self._loads[lane]
            self._loads[lane] = LaneLoad(
                requests=load.requests + 1, rows=load.rows + ticket.rows, slot_bytes=load.slot_bytes
            )
            self._lock.notify_all()  # another lane may be the least loaded now
            return ticket

    def _next(self, lane: int) -> Ticket | None:
        rows = self._loads[lane].rows
        if not self._queue or rows > min(load.rows for load in self._loads):
            return None
        ticket = self._queue[0]
        return None if rows and rows + ticket.rows > self._max_lane_rows else ticket

    def note(self, lane: int, load: LaneLoad) -> None:
        """Take note of what a lane has on its hands now."""
        with self._lock:
            self._loads[lane] = load
            self._lock.notify_all()

    def launched(self, *, rows: int, bucket: int) -> None:
        """Count a launch of a block."""
        with self._lock:
            self._launches.update(launches=1, used=rows, launched=bucket)

    def end_waiting(self) -> None:
        """End the requests that were cancelled, or whose deadline passed, while they waited."""
        with self._lock:
            overdue = [(ticket, error) for ticket in self._queue if (error := ticket.reason_to_stop()) is not None]
            for ticket, _ in overdue:
                self._queue.remove(ticket)
        for ticket, error in overdue:
            self.deliver(ticket, ticket.end(None, error))

    def deliver(self, ticket: Ticket, outcome: Outcome) -> None:
        """Count a request's end, and hand its outcome over."""
        with self._lock:
            self._finished[outcome.ending] += 1
            if outcome.result is not None:
                trace = outcome.result.trace
                self._traced.update(
                    evaluations=trace.launches, reuses=trace.reuses, trips=trace.steps_decided_by(TRIPS)
                )
        ticket.deliver(outcome)

    def end_queue(self, error: AdaCorrError) -> None:
        """End all who wait, once the desk is closed: a lane that leaves has either seen to them or has no time left."""
        with self._lock:
            tickets = [*self._queue]
            self._queue.clear()
        for ticket in tickets:
            self.deliver(ticket, ticket.end(None, error))
