"""Step-level continuous batching: requests of any steps, policies and arrival times share block launches.

Each request runs its own loop in its own workspace, and stops where it wants blocks evaluated. A sweep passes over the
blocks again and again, and at each evaluates all rows that wait there, in launches of bucket sizes. Whoever reuses a
block is not in its launch, and waits at a later one; a new request boards when the sweep comes to its first block. So
nobody waits longer than one pass, and rows meet although their steps differ.

A request's result is the same, bit for bit, alone and among any neighbours: all that it reads is its own, a row's
arithmetic does not depend on the other rows, and buckets in which it would are left out (`batch_buckets`).

    desk    where requests wait (`batch_desk`)
    lane    a thread with its requests, its sweep and its buffers (`batch_lane`); a GPU's stream takes one
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.core.errors import EngineError, RequestError
from adacorr_deploy.runtime.batch_desk import Desk, EngineStats
from adacorr_deploy.runtime.batch_lane import Lane
from adacorr_deploy.runtime.batch_ticket import Listeners, Outcome, Ticket
from adacorr_deploy.runtime.blocks_by_size import BlocksBySize, Trials
from adacorr_deploy.runtime.denoise import Progress
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.planned_run import PlannedRun
from adacorr_deploy.runtime.request import SampleRequest, check_integer
from adacorr_deploy.runtime.sampling import planned_with_policy
from adacorr_deploy.runtime.workspace_pool import WorkspacePool

DEFAULT_BUCKETS: Final = (1, 2, 4, 6, 8, 12, 16, 24)  # rows: an image has two with guidance, else one
DRAIN_SECONDS: Final = 30.0
IDLE_BYTES: Final = 512 << 20
MAX_LANES: Final = 256
_MAX_NUMBER: Final = 1_000_000


class BatchingEngine:
    """Serves many requests at once over one pipeline, in threads of its own. Use it as a context manager.

    It holds the pipeline from its making until it is closed; closing the pipeline closes the engine.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        buckets: Sequence[int] = DEFAULT_BUCKETS,
        max_queue: int = 64,
        max_active_rows: int | None = None,
        lanes: int = 1,
        idle_bytes: int = IDLE_BYTES,
    ) -> None:
        """Hold the pipeline, try the buckets, and start the threads.

        Args:
            pipeline: An open bundle that nobody else samples from meanwhile.
            buckets: Rows that a launch may have, ascending or not.
            max_queue: Requests that may wait; one more is refused.
            max_active_rows: Rows of the requests that run at the same time, shared evenly among the lanes; one request
                alone may have more. More fill launches when some requests reuse, but each then takes longer. By default
                twice the largest bucket.
            lanes: Threads that serve requests side by side. On a CPU, as many lanes as cores over a pipeline whose
                launches take one thread (`OnnxRuntimeBackend(threads=1)`) give the most throughput, and one lane over
                launches that take all cores gives a lone request the shortest time. On a GPU, 1.
            idle_bytes: Of workspaces that are kept for the next requests of the same sizes.

        Raises:
            RequestError: If a number is out of range, or the engines were not compiled for any of the buckets.
            EngineError: If the pipeline is busy or closed, an engine fails, or there is no memory.
        """
        check_integer("max_queue", max_queue, 1, _MAX_NUMBER)
        check_integer("lanes", lanes, 1, MAX_LANES if pipeline.backend.hardware == "CPU" else 1)
        if max_active_rows is not None:
            check_integer("max_active_rows", max_active_rows, 1, _MAX_NUMBER)
        self._pipeline = pipeline
        with ExitStack() as resources:
            resources.enter_context(pipeline.exclusive())
            trials = Trials()
            shared = [BlocksBySize(pipeline, buckets, trials) for _ in range(lanes)]
            _, self.buckets = shared[0].of(None)
            self._resources = resources.pop_all()
        rows = 2 * self.buckets.largest if max_active_rows is None else max_active_rows
        self._desk = Desk(lanes=lanes, max_queue=max_queue, max_lane_rows=max(1, rows // lanes))
        self._pools = [WorkspacePool(pipeline, idle_bytes=idle_bytes // lanes) for _ in shared]
        blocks = len(pipeline.manifest.model.units)
        self._threads = [
            threading.Thread(
                target=Lane(number, self._desk, launches, pool, blocks=blocks).serve,
                name=f"adacorr-batching-{number}",
                daemon=True,
            )
            for number, (launches, pool) in enumerate(zip(shared, self._pools, strict=True))
        ]
        for thread in self._threads:
            thread.start()
        self._resources.enter_context(pipeline.called_before_close(self.close))

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
        self._desk.refuse_if_closed_or_full()  # before the work of planning
        run = planned_with_policy(self._pipeline, request, policy)
        listeners = Listeners(on_done=on_done, on_step=on_step, preview_every=preview_every, on_preview=on_preview)
        return self.submit_planned(run, listeners, asked_steps=request.steps, deadline=deadline)

    def submit_planned(
        self, run: PlannedRun, listeners: Listeners, *, asked_steps: int | None = None, deadline: float | None = None
    ) -> Ticket:
        """Queue a planned run, under any controller; errors as those of `submit`."""
        if deadline is not None and not math.isfinite(deadline):
            raise RequestError(f"deadline is {deadline}, allowed is a time on time.monotonic()'s clock, or None.")
        check_integer("preview_every", listeners.preview_every, 0, _MAX_NUMBER)
        asked = run.request.steps if asked_steps is None else asked_steps
        ticket = Ticket(run=run, asked_steps=asked, deadline=deadline, listeners=listeners)
        self._desk.put(ticket)
        return ticket

    def stats(self) -> EngineStats:
        """Return what the engine does now, and what it did so far."""
        return self._desk.stats()

    def close(self, *, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Take no further request, finish those that are here, and end with an error those that take too long.

        Returns once the threads have ended, at most one block launch after `drain_seconds`, 0 of which end all at once.
        A second call may shorten the time.

        Raises:
            EngineError: If a listener calls it: its thread would wait for itself.
        """
        if threading.current_thread() in self._threads:
            raise EngineError("A listener can't close the engine that calls it. Close it from another thread.")
        self._desk.close(drain_seconds=drain_seconds)
        for thread in self._threads:
            thread.join()
        self._resources.close()

    def __enter__(self) -> BatchingEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain_seconds=DRAIN_SECONDS if kind is None else 0.0)
