"""Development stand-in: one request at a time, until runtime.batching is there."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.core.errors import AdaCorrError, SamplingCancelledError
from adacorr_deploy.runtime import Pipeline, Progress, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.serving.engine import Finished, OnPreview


class QueueFullError(AdaCorrError):
    def __init__(self, depth: int) -> None:
        super().__init__(f"The queue is full: {depth} requests are waiting. Try again later.")


class ClosedError(AdaCorrError):
    pass


@dataclass(frozen=True, kw_only=True)
class Stats:
    queue_depth: int
    active_requests: int
    slot_bytes: int = 0
    occupancy: float = 1.0
    launches: int = 0
    guard_trips: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    result: SampleResult | None = None
    error: AdaCorrError | None = None
    queue_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Job:
    request: SampleRequest
    policy: Policy
    deadline: float | None
    on_step: Progress | None
    on_done: Callable[[Finished], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def stop(self) -> bool:
        return self.cancelled or (self.deadline is not None and time.monotonic() > self.deadline)


class OneAtATime:
    def __init__(self, pipeline: Pipeline, max_queue: int) -> None:
        self._pipeline = pipeline
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._max = max_queue
        self._active = 0
        self._launches = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(
        self,
        request: SampleRequest,
        policy: Policy,
        *,
        deadline: float | None = None,
        on_step: Progress | None = None,
        on_done: Callable[[Finished], None],
        preview_every: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Job:
        if self._jobs.qsize() >= self._max:
            raise QueueFullError(self._jobs.qsize())
        job = Job(request, policy, deadline, on_step, on_done)
        self._jobs.put(job)
        return job

    def stats(self) -> Stats:
        return Stats(queue_depth=self._jobs.qsize(), active_requests=self._active, launches=self._launches)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = time.monotonic()
            waited = started - job.arrived
            try:
                if job.stop():
                    raise SamplingCancelledError("Cancelled while it waited.")
                self._active = 1
                result = sample_with_policy(
                    self._pipeline, job.request, job.policy, progress=job.on_step, cancelled=job.stop
                )
                self._launches += result.launches
                done = Outcome(result=result, queue_seconds=waited, seconds=time.monotonic() - started)
            except AdaCorrError as error:
                done = Outcome(error=error, queue_seconds=waited, seconds=time.monotonic() - started)
            self._active = 0
            job.on_done(done)
