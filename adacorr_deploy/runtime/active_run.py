"""A request that runs: its loop, stopped at the evaluation that it wants next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

from adacorr_deploy.core.errors import AdaCorrError, SamplingCancelledError
from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.runtime.batch_ticket import Ticket, as_adacorr_error
from adacorr_deploy.runtime.denoise import BlockWork, Denoiser, Progress
from adacorr_deploy.runtime.pipeline import SampleResult
from adacorr_deploy.runtime.sampling import of_asked_steps
from adacorr_deploy.runtime.shared_blocks import Seat
from adacorr_deploy.runtime.workspace import Workspace
from adacorr_deploy.runtime.workspace_pool import WorkspacePool


class ActiveRun:
    """One request in a workspace of its own. It stands before a block (`block`), or has ended (`ended`)."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.block = 0  # the part that is to be evaluated next
        self.result: SampleResult | None = None
        self.error: AdaCorrError | None = None
        self._resources = ExitStack()
        self._denoiser: Denoiser | None = None
        self._works: Iterator[BlockWork] = iter(())
        self._work: BlockWork | None = None
        self._seated = 0  # rows of this block that were evaluated already, or are in the present launch
        self._launches = 0
        self._began = 0.0

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None

    @property
    def rows_waiting(self) -> int:
        return self.ticket.rows - self._seated

    @property
    def latents(self) -> LatentSize | None:
        """The size of its latents; None is the model's default."""
        return self.ticket.run.size.latents

    def start(self, pool: WorkspacePool) -> None:
        """Take a workspace, prepare it, and go on to the first block. A failure ends this request alone."""
        self._began = time.perf_counter()
        self.ticket.started = time.monotonic()
        try:
            space, slots = self._resources.enter_context(pool.lease(self.ticket.run))
            self._denoiser = self.ticket.run.start(
                space, slots, progress=_progress(self.ticket, space), cancelled=self._must_stop
            )
            self._works = self._denoiser.works()
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends this request and no other)
            self.fail(as_adacorr_error(error))
        else:
            self._advance()

    def seat(self, rows: int) -> Seat:
        """Let at most so many of the waiting rows take part in the next launch."""
        if self._work is None:
            raise AssertionError("a run without work has no seat")
        seat = Seat(work=self._work, first=self._seated, rows=min(rows, self.rows_waiting))
        self._seated += seat.rows
        return seat

    def evaluated(self) -> None:
        """Take note that the seated rows were evaluated; once all are, go on to the next block."""
        if self.rows_waiting or self._work is None:
            return
        self._seated = 0
        self._launches += 1
        if self.block + 1 < self._work.first + len(self._work.slots):
            self.block += 1
        else:
            self._advance()

    def fail(self, error: AdaCorrError) -> None:
        """End the request with an error, and give its workspace back."""
        self.error = error
        self._release()

    def _advance(self) -> None:
        """Run the loop up to the next evaluation, or to its end."""
        try:
            self._work = next(self._works, None)
            if self._work is not None:
                self.block = self._work.first
                return
            self.result = self._finished()
        except SamplingCancelledError as error:
            self.error = self.ticket.reason_to_stop() or error
        except Exception as error:  # noqa: BLE001 (a listener may raise anything)
            self.error = as_adacorr_error(error)
        self._release()

    def _finished(self) -> SampleResult:
        if self._denoiser is None:
            raise AssertionError("a run that did not start can't finish")
        latents, trace = self._denoiser.final_latents(), self._denoiser.trace
        result = SampleResult(
            latents=latents,
            trace=trace,
            launches=self._launches,
            rho=trace.rho,
            seconds=time.perf_counter() - self._began,
            steps=trace.steps,
        )
        return of_asked_steps(result, self.ticket.asked_steps)

    def _release(self) -> None:
        """Give the workspace back, cleared. If that fails, it is not used again, and the request fails."""
        self._works, self._work, self._denoiser = iter(()), None, None
        try:
            self._resources.close()
        except Exception as error:  # noqa: BLE001 (as above)
            self.result, self.error = None, self.error or as_adacorr_error(error)

    def _must_stop(self) -> bool:
        return self.ticket.reason_to_stop() is not None


def _progress(ticket: Ticket, space: Workspace) -> Progress:
    """Return what the loop calls after each step."""
    listeners = ticket.listeners

    def progress(step: int, steps: int, rho: float) -> None:
        if listeners.on_step is not None:
            listeners.on_step(step, steps, rho)
        if listeners.on_preview is not None and listeners.preview_every and step % listeners.preview_every == 0:
            listeners.on_preview(step, space.read_latents(step - 1))

    return progress
