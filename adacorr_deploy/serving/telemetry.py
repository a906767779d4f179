"""OpenTelemetry spans of requests and their steps, exported by the model itself.

Triton's own tracing ends at the model: it knows neither steps nor decisions, and 24.10 crashes when a model hands its
trace on. So spans are made here, as children of the span that the client, or Triton, names. They are made once a
request has ended, from times that were noted meanwhile, and sent by a thread of the SDK's: sampling never waits for a
collector.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Final

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.runtime import SampleResult
from adacorr_deploy.serving.metrics import Outcome
from adacorr_deploy.serving.results import JsonValue

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACEPARENT: Final = "traceparent"
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?P<trace>[0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context
_SERVICE: Final = "adacorr-deploy"
_MOST_STEPS: Final = 1000  # of a request, that have spans of their own


def traceparent_from(context: JsonValue, parameters: Mapping[str, JsonValue]) -> str | None:
    """Return the span that a request belongs to, in W3C's form; None where there is none, or it is malformed.

    Args:
        context: Of the server's own trace, JSON, which comes first: its span is a child of the client's.
        parameters: Of the request, where a `traceparent` stands that the client sent or the server took from a header.
    """
    try:
        found = json.loads(context)[TRACEPARENT] if isinstance(context, str) and context else None
    except (ValueError, KeyError, TypeError, RecursionError):  # a client may have written it
        found = None
    if found is None:  # HTTP keeps the case of a header's name
        found = next((value for name, value in parameters.items() if name.lower() == TRACEPARENT), None)
    return found if isinstance(found, str) and _TRACEPARENT.fullmatch(found) else None


def trace_id(traceparent: str | None) -> str | None:
    match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return match["trace"] if match else None


@dataclass(slots=True)
class Timeline:
    """When a request came and when each of its steps ended, in nanoseconds since the epoch."""

    arrived: int = field(default_factory=time.time_ns)
    steps: list[tuple[int, float]] = field(default_factory=list)  # end, and ρ so far
    _last: float | None = None  # end of the last step, on `time.monotonic()`'s clock

    def stepped(self, rho: float) -> float | None:
        """Note the end of a step, and return the seconds since that of the one before; None of the first."""
        before, self._last = self._last, time.monotonic()
        if len(self.steps) < _MOST_STEPS:
            self.steps.append((time.time_ns(), rho))
        return None if before is None else self._last - before


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """What is told of a request that has ended.

    Attributes:
        request_id: Its client's, or the server's own.
        traceparent: The span that it belongs to; None makes it a trace of its own.
        outcome: How it ended.
        attributes: What else is known of it; `message` says what went wrong, and those that are None are left out.
        timeline: When it came, and its steps.
        queue_seconds: What it waited before its first step.
        result: What was sampled; None where nothing was.
    """

    request_id: str
    traceparent: str | None
    outcome: Outcome
    attributes: Mapping[str, JsonValue]
    timeline: Timeline = field(default_factory=Timeline)
    queue_seconds: float = 0.0
    result: SampleResult | None = None


class Tracing:
    """Spans by way of the OpenTelemetry SDK, which takes its settings from OTEL_… variables."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(_SERVICE)

    def ended(self, request: EndedRequest) -> None:
        """Make the span of a request, and those of its steps."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        timeline = request.timeline
        caller = {} if request.traceparent is None else {TRACEPARENT: request.traceparent}
        parent = TraceContextTextMapPropagator().extract(caller)
        span = self._tracer.start_span("adacorr.request", parent, trace.SpanKind.SERVER, start_time=timeline.arrived)
        about = {"request_id": request.request_id, "outcome": request.outcome.value, **request.attributes}
        span.set_attributes({f"adacorr.{name}": value for name, value in about.items() if value is not None})
        if request.outcome is not Outcome.DONE:
            span.set_status(trace.StatusCode.ERROR, str(about.get("message", "")))
        inside = trace.set_span_in_context(span)
        begun = timeline.arrived + int(request.queue_seconds * 1e9)
        decisions = {} if request.result is None else _decisions_by_step(request.result)
        for step, (ended, rho) in enumerate(timeline.steps):
            of_step = {"adacorr.step": step, "adacorr.rho": rho, **decisions.get(step, {})}
            self._tracer.start_span("adacorr.step", inside, start_time=begun, attributes=of_step).end(ended)
            begun = ended
        span.end()

    def close(self) -> None:
        """Send what is left, within the SDK's own limit of time."""
        self._provider.shutdown()


def _decisions_by_step(result: SampleResult) -> dict[int, dict[str, int | Sequence[str]]]:
    """Return the attributes that the trace of decisions gives each step: what each block did, and how many launched."""
    branch = result.trace.branches[0]  # they decide together
    records = sorted((each for each in result.trace.records if each.branch is branch), key=lambda each: each.step)
    found: dict[int, dict[str, int | Sequence[str]]] = {}
    for step, group in groupby(records, key=lambda each: each.step):
        of_step = [*group]
        found[step] = {
            "adacorr.launches": sum(each.action is not Action.REUSE for each in of_step),
            "adacorr.decisions": [f"{each.block}: {each.action.value} ({each.reason})" for each in of_step],
        }
    return found


def tracing_from_environment(model: str) -> tuple[Tracing | None, str | None]:
    """Return what sends spans to the collector that the standard variables name; None where they name none.

    Returns:
        It, and what stands in its way if a collector is named but can't be had.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None, None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        return None, f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}, allowed is http/protobuf. No spans are sent."
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        return None, f"A collector is named, but {error}. Install requirements-telemetry.txt. No spans are sent."
    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: f"{_SERVICE}/{model}"}
    provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider), None
