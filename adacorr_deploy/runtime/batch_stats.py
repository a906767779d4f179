"""What the batching engine counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from adacorr_deploy.caching.guards import TRIPS
from adacorr_deploy.runtime.active_run import ActiveRun
from adacorr_deploy.runtime.batch_ticket import Ending
from adacorr_deploy.runtime.trace import Trace


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


@dataclass(slots=True)
class Counts:
    """The running counts, written by the engine's thread under its lock."""

    launches: int = 0
    rows_used: int = 0
    rows_launched: int = 0
    block_evaluations: int = 0
    block_reuses: int = 0
    guard_trips: int = 0
    finished: Counter[Ending] = field(default_factory=Counter)

    def launched(self, *, rows: int, bucket: int) -> None:
        self.launches += 1
        self.rows_used += rows
        self.rows_launched += bucket

    def count(self, trace: Trace) -> None:
        self.block_evaluations += trace.launches
        self.block_reuses += trace.reuses
        self.guard_trips += trace.steps_decided_by(TRIPS)

    def snapshot(self, *, queue_depth: int, active: list[ActiveRun], slot_bytes: int) -> EngineStats:
        return EngineStats(
            queue_depth=queue_depth,
            active_requests=len(active),
            active_rows=sum(run.ticket.rows for run in active),
            slot_bytes=slot_bytes,
            launches=self.launches,
            rows_used=self.rows_used,
            rows_launched=self.rows_launched,
            block_evaluations=self.block_evaluations,
            block_reuses=self.block_reuses,
            guard_trips=self.guard_trips,
            finished={ending: self.finished[ending] for ending in Ending},
        )
