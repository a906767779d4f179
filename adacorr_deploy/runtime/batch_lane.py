"""A lane of the batching engine: one thread, the requests that run in it, and the sweep over the blocks they share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from adacorr_deploy.core.errors import AdaCorrError, ClosedError
from adacorr_deploy.runtime.active_run import ActiveRun
from adacorr_deploy.runtime.batch_desk import Desk, LaneLoad
from adacorr_deploy.runtime.batch_ticket import as_adacorr_error
from adacorr_deploy.runtime.blocks_by_size import BlocksBySize
from adacorr_deploy.runtime.shared_blocks import Seat, SharedBlocks
from adacorr_deploy.runtime.workspace_pool import WorkspacePool

_LOG = logging.getLogger(__name__)


class Lane:
    """Serves the requests that the desk gives it. Only `serve` may be called, in a thread of its own."""

    def __init__(self, number: int, desk: Desk, shared: BlocksBySize, pool: WorkspacePool, *, blocks: int) -> None:
        self._number = number
        self._desk = desk
        self._shared = shared
        self._pool = pool
        self._sweep = Sweep(blocks)
        self._active: list[ActiveRun] = []  # in order of admission

    def serve(self) -> None:
        """Serve until the desk is closed. Whatever happens, every request gets its outcome."""
        reason: AdaCorrError = ClosedError("The batching engine was closed before the request had ended. Try again.")
        try:
            while self._desk.wait_for_work(self._number):
                self._end_those_that_must_stop()
                self._admit()
                self._serve_block()
        except BaseException as error:  # noqa: BLE001 (no caller may wait for ever)
            _LOG.exception("a lane of the batching engine failed")
            reason = as_adacorr_error(error)
            self._desk.close(drain_seconds=0.0)  # the other lanes stop at their next look
        finally:
            for run in self._active:
                if not run.ended:
                    run.fail(reason)
            self._settle()
            self._desk.end_queue(reason)
            self._pool.clear()

    def _end_those_that_must_stop(self) -> None:
        for run in self._active:
            if (error := run.ticket.reason_to_stop()) is not None:
                run.fail(error)
        self._settle()
        self._desk.end_waiting()

    def _admit(self) -> None:
        """Start those who wait, in their order, while there is room; a large one waits until it has all of it."""
        while (ticket := self._desk.take(self._number)) is not None:
            run = ActiveRun(ticket)
            self._active.append(run)
            run.start(self._pool)
            self._note()
            self._settle()

    def _serve_block(self) -> None:
        """Evaluate the block that the sweep comes to next, for all who wait there now, size by size."""
        block, stopped = self._sweep.next_stop(self._active)
        for latents in dict.fromkeys(run.latents for run in stopped):
            waiting = [run for run in stopped if run.latents == latents and not run.ended]
            try:
                shared, buckets = self._shared.of(latents)
            except Exception as error:  # noqa: BLE001 (whatever it is, it ends these requests and no other)
                self._fail(waiting, error)
                continue
            while waiting:
                bucket = buckets.deal(sum(run.rows_waiting for run in waiting))[0]
                seated = [*_seats(waiting, bucket)]
                waiting = [run for run in waiting if run.rows_waiting]  # not yet, or not all of them
                self._launch(shared, block, seated, bucket)
                self._end_those_that_must_stop()
                waiting = [run for run in waiting if not run.ended]

    def _fail(self, runs: Sequence[ActiveRun], error: Exception) -> None:
        for run in runs:
            run.fail(as_adacorr_error(error))
        self._settle()

    def _launch(self, shared: SharedBlocks, block: int, seated: Sequence[tuple[ActiveRun, Seat]], bucket: int) -> None:
        """Evaluate a block for some rows. If the engine fails, it fails for these requests alone."""
        runs, seats = [run for run, _ in seated], [seat for _, seat in seated]
        try:
            shared.run(block, seats, bucket=bucket)
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends these requests and no other)
            self._fail(runs, error)
        else:
            self._desk.launched(rows=sum(seat.rows for seat in seats), bucket=bucket)
            for run in runs:
                run.evaluated()
            self._settle()

    def _settle(self) -> None:
        """Part with those who have ended: their workspaces are back already."""
        ended = [run for run in self._active if run.ended]
        if not ended:
            return
        self._active = [run for run in self._active if not run.ended]
        self._note()
        for run in ended:
            self._desk.deliver(run.ticket, run.ticket.end(run.result, run.error))

    def _note(self) -> None:
        rows = sum(run.ticket.rows for run in self._active)
        load = LaneLoad(requests=len(self._active), rows=rows, slot_bytes=self._pool.lent_bytes)
        self._desk.note(self._number, load)


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
