"""The metrics that a server shows: one table of them, and what turns events into their values.

Triton's own counters take a returned error for a success, so outcomes are counted here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from adacorr_deploy.serving.engine import EngineStats

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SHARES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class MetricKind(str, Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Outcome(str, Enum):
    """How a request can end."""

    DONE = "done"
    REFUSED = "refused"  # its fields
    REJECTED = "rejected"  # no room in the queue, or the server is stopping
    CANCELLED = "cancelled"  # by its client, present or gone
    TIMED_OUT = "timed_out"  # by its own deadline
    FAILED = "failed"  # NaN, or an engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric family.

    Attributes:
        name: As Prometheus has it.
        kind: What may happen to it.
        text: What it tells.
        label: Name of its label, for families of several metrics.
        values: Every value that the label takes: each is there from the start, at 0.
        buckets: Upper bounds of a histogram.
    """

    name: str
    kind: MetricKind
    text: str
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the time series that Prometheus keeps of it."""
        ends = ("_bucket", "_sum", "_count") if self.kind is MetricKind.HISTOGRAM else ("",)
        return tuple(f"{self.name}{end}" for end in ends)


REQUESTS: Final = Metric(
    name="adacorr_requests_total",
    kind=MetricKind.COUNTER,
    text="Sampling requests by how they ended",
    label="outcome",
    values=tuple(outcome.value for outcome in Outcome),
)
IMAGES: Final = Metric(name="adacorr_images_total", kind=MetricKind.COUNTER, text="Images sampled")
LAUNCHES: Final = Metric(
    name="adacorr_block_launches_total", kind=MetricKind.COUNTER, text="Block engine launches, shared ones once"
)
GUARD_TRIPS: Final = Metric(
    name="adacorr_guard_trips_total", kind=MetricKind.COUNTER, text="Evaluations that a guard forced"
)
QUEUE_DEPTH: Final = Metric(name="adacorr_queue_depth", kind=MetricKind.GAUGE, text="Requests that wait")
ACTIVE: Final = Metric(name="adacorr_active_requests", kind=MetricKind.GAUGE, text="Requests being sampled")
SLOT_BYTES: Final = Metric(
    name="adacorr_slot_bytes", kind=MetricKind.GAUGE, text="Memory that cache slots of active requests hold"
)
OCCUPANCY: Final = Metric(
    name="adacorr_batch_occupancy", kind=MetricKind.GAUGE, text="Rows that were asked for among rows launched, 0 to 1"
)
REQUEST_SECONDS: Final = Metric(
    name="adacorr_request_seconds",
    kind=MetricKind.HISTOGRAM,
    text="From the arrival of a request to its end",
    buckets=_SECONDS,
)
QUEUE_SECONDS: Final = Metric(
    name="adacorr_queue_seconds", kind=MetricKind.HISTOGRAM, text="What requests waited", buckets=_SECONDS
)
STEP_SECONDS: Final = Metric(
    name="adacorr_step_seconds",
    kind=MetricKind.HISTOGRAM,
    text="From one step of a request to the next",
    buckets=_STEP_SECONDS,
)
RHO: Final = Metric(
    name="adacorr_rho",
    kind=MetricKind.HISTOGRAM,
    text="Share of a request's block launches that were skipped, 0 to 1",
    buckets=_SHARES,
)
METRICS: Final = (
    REQUESTS,
    IMAGES,
    LAUNCHES,
    GUARD_TRIPS,
    QUEUE_DEPTH,
    ACTIVE,
    SLOT_BYTES,
    OCCUPANCY,
    REQUEST_SECONDS,
    QUEUE_SECONDS,
    STEP_SECONDS,
    RHO,
)


class MetricSink(Protocol):
    """Where values go: the server's registry."""

    def increment(self, metric: Metric, value: float, label: str | None = None) -> None: ...

    def set(self, metric: Metric, value: float) -> None: ...

    def observe(self, metric: Metric, value: float) -> None: ...


@dataclass(frozen=True, slots=True)
class _Observation:
    metric: Metric
    value: float
    label: str | None = None


@dataclass(slots=True)
class Recorder:
    """Gathers what happens, and hands it on now and then: a metric of Triton's costs a message to another process."""

    sink: MetricSink
    _pending: list[_Observation] = field(default_factory=list)
    _counted: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, metric: Metric, value: float = 1, label: str | None = None) -> None:
        with self._lock:
            self._pending.append(_Observation(metric, value, label))

    observe = count

    def flush(self, stats: EngineStats, *, waiting: int = 0) -> None:
        """Hand on what was gathered, and the engine's own numbers; so many requests wait elsewhere, before it."""
        with self._lock:
            pending, self._pending = self._pending, []
        for each in pending:
            if each.metric.kind is MetricKind.HISTOGRAM:
                self.sink.observe(each.metric, each.value)
        for (metric, label), value in _sums(pending).items():
            self.sink.increment(metric, value, label)
        self._catch_up(LAUNCHES, stats.launches)
        self._catch_up(GUARD_TRIPS, stats.guard_trips)
        self.sink.set(QUEUE_DEPTH, stats.queue_depth + waiting)
        self.sink.set(ACTIVE, stats.active_requests)
        self.sink.set(SLOT_BYTES, stats.slot_bytes)
        self.sink.set(OCCUPANCY, stats.occupancy)

    def _catch_up(self, metric: Metric, total: float) -> None:
        """Bring a counter to what the engine has counted since the start."""
        more = total - self._counted.get(metric.name, 0)
        if more > 0:
            self.sink.increment(metric, more)
            self._counted[metric.name] = total


def _sums(observations: list[_Observation]) -> Mapping[tuple[Metric, str | None], float]:
    sums: dict[tuple[Metric, str | None], float] = {}
    for each in observations:
        if each.metric.kind is MetricKind.COUNTER:
            key = (each.metric, each.label)
            sums[key] = sums.get(key, 0) + each.value
    return sums
