"""An engine whose requests end when a test says so; a client that keeps its answer, and a registry its metrics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.core.errors import AdaCorrError, SamplingCancelledError
from adacorr_deploy.runtime import Progress, SampleRequest, SampleResult, Trace
from adacorr_deploy.serving.engine import Finished, OnPreview
from adacorr_deploy.serving.metrics import Metric
from adacorr_deploy.serving.replies import Status
from adacorr_deploy.serving.tensors import Tensors

SECONDS = 30.0  # that a test waits for what must come


@dataclass(frozen=True, kw_only=True)
class ScriptedStats:
    queue_depth: int = 1
    active_requests: int = 2
    slot_bytes: int = 3
    occupancy: float = 0.5
    launches: int = 40
    guard_trips: int = 4


@dataclass(frozen=True, kw_only=True)
class ScriptedOutcome:
    result: SampleResult | None = None
    error: AdaCorrError | None = None
    queue_seconds: float = 0.25
    seconds: float = 0.75


@dataclass(kw_only=True)
class Job:
    request: SampleRequest
    policy: Policy
    deadline: float | None
    on_step: Progress | None
    on_done: Callable[[Finished], None]
    on_preview: OnPreview | None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()
        self.fail(SamplingCancelledError("Cancelled."))

    def step(self, step: int) -> None:
        assert self.on_step is not None
        self.on_step(step, self.request.steps, 0.5)

    def finish(self) -> None:
        self.on_done(ScriptedOutcome(result=result_of(self.request)))

    def fail(self, error: AdaCorrError) -> None:
        self.on_done(ScriptedOutcome(error=error))


def result_of(request: SampleRequest) -> SampleResult:
    latents: NDArray[np.float32] = np.full((request.batch, 1, 4, 4), request.seed, dtype=np.float32)
    return SampleResult(
        latents=latents, trace=Trace(request.steps, (), ()), launches=7, rho=0.5, seconds=0.5, steps=request.steps
    )


class ScriptedEngine:
    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.refusal: AdaCorrError | None = None
        self.closed = False

    def submit(
        self,
        request: SampleRequest,
        policy: Policy,
        *,
        on_done: Callable[[Finished], None],
        deadline: float | None = None,
        on_step: Progress | None = None,
        preview_every: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Job:
        if self.refusal is not None:
            raise self.refusal
        self.jobs.append(
            Job(
                request=request,
                policy=policy,
                deadline=deadline,
                on_step=on_step,
                on_done=on_done,
                on_preview=on_preview,
            )
        )
        return self.jobs[-1]

    def stats(self) -> ScriptedStats:
        return ScriptedStats()

    def close(self) -> None:
        self.closed = True


class Client:
    """A reply that keeps what it is given; a second answer is an error, as it is for a server."""

    def __init__(self) -> None:
        self.gone = False
        self._answered = threading.Event()
        self._tensors: Tensors = {}
        self._failure: tuple[Status, str] | None = None

    def send(self, tensors: Tensors) -> None:
        assert not self._answered.is_set()
        self._tensors = tensors
        self._answered.set()

    def fail(self, status: Status, message: str) -> None:
        assert not self._answered.is_set()
        self._failure = (status, message)
        self._answered.set()

    def is_cancelled(self) -> bool:
        assert not self._answered.is_set()
        return self.gone

    @property
    def answered(self) -> bool:
        return self._answered.is_set()

    @property
    def tensors(self) -> Tensors:
        assert self._answered.wait(SECONDS)
        assert self._failure is None, self._failure
        return self._tensors

    @property
    def failure(self) -> tuple[Status, str]:
        assert self._answered.wait(SECONDS)
        assert self._failure is not None
        return self._failure


class CountingSink:
    """A registry of metrics."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str | None]] = Counter()
        self.gauges: dict[str, float] = {}
        self.observations: list[tuple[str, float]] = []

    def increment(self, metric: Metric, value: float, label: str | None = None) -> None:
        self.counts[metric.name, label] += int(value)

    def set(self, metric: Metric, value: float) -> None:
        self.gauges[metric.name] = value

    def observe(self, metric: Metric, value: float) -> None:
        self.observations.append((metric.name, value))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
