"""What the metrics, the log and the spans tell of a request is the same, and no collector's trouble is a request's."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field

import pytest

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.core.errors import AdaCorrError, DeadlineExceededError, EngineError, RequestError
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.serving.logs import JsonLog
from adacorr_deploy.serving.metrics import IMAGES, QUEUE_SECONDS, REQUEST_SECONDS, REQUESTS, RHO, STEP_SECONDS, Recorder
from adacorr_deploy.serving.orders import Order
from adacorr_deploy.serving.replies import Incoming
from adacorr_deploy.serving.reports import Reports
from adacorr_deploy.serving.telemetry import EndedRequest, Timeline, Tracing
from tests.serving.scripted_engine import CountingSink, ScriptedOutcome, ScriptedStats, result_of

TRACE = "0af7651916cd43dd8448eb211c80319c"
INCOMING = Incoming(
    request_id="r1", tensors=dict, parameters={}, wanted=frozenset(), traceparent=f"00-{TRACE}-b7ad6b7169203331-01"
)
ORDER = Order(
    request=SampleRequest((1, 2), steps=8),
    policy=policy_named("robust"),
    outputs=(),
    timeout_seconds=None,
    preview_every=0,
)


class Collected(Tracing):
    """Keeps what spans would be made of, or fails to."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.requests: list[EndedRequest] = []
        self.failure = failure

    def ended(self, request: EndedRequest) -> None:
        if self.failure is not None:
            raise self.failure
        self.requests.append(request)


@dataclass
class Told:
    """Reports, and what came of them."""

    spans: Collected = field(default_factory=Collected)
    sink: CountingSink = field(default_factory=CountingSink)
    lines: io.StringIO = field(default_factory=io.StringIO)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.sink)
        self.reports = Reports(recorder=self.recorder, log=JsonLog("tiny", self.lines), tracing=self.spans)

    @property
    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]

    def flushed(self) -> CountingSink:
        self.recorder.flush(ScriptedStats())
        return self.sink


def test_a_result_is_told_alike_everywhere() -> None:
    told, timeline = Told(), Timeline()
    for rho in (0.0, 0.5):
        told.reports.stepped(timeline, rho)
    finished = ScriptedOutcome(result=result_of(ORDER.request))
    told.reports.ended(INCOMING, ORDER, timeline, finished)
    (line,), (span,) = told.log, told.spans.requests
    assert (line["request_id"], line["trace_id"], line["outcome"], line["level"]) == ("r1", TRACE, "done", "info")
    assert line.items() >= span.attributes.items()
    assert span.attributes.items() >= {"images": 2, "steps": 8, "policy": "robust", "rho": 0.5, "launches": 7}.items()
    assert (span.traceparent, span.queue_seconds, span.result) == (INCOMING.traceparent, 0.25, finished.result)
    assert [rho for _, rho in span.timeline.steps] == [0.0, 0.5]
    sink = told.flushed()
    assert (sink.counts[REQUESTS.name, "done"], sink.counts[IMAGES.name, None]) == (1, 2)
    observed = dict(sink.observations)
    assert observed.pop(STEP_SECONDS.name) >= 0
    assert observed == {QUEUE_SECONDS.name: 0.25, REQUEST_SECONDS.name: 0.75, RHO.name: 0.5}


@pytest.mark.parametrize(
    ("error", "outcome", "level"),
    [
        (EngineError("The latents hold NaN."), "failed", "error"),
        (DeadlineExceededError("Too late."), "timed_out", "warning"),
    ],
)
def test_an_error_is_told_alike_everywhere_and_counts_no_images(error: AdaCorrError, outcome: str, level: str) -> None:
    told = Told()
    told.reports.ended(INCOMING, ORDER, Timeline(), ScriptedOutcome(error=error), error)
    (line,), (span,) = told.log, told.spans.requests
    assert (line["message"], line["outcome"], line["level"]) == (str(error), outcome, level)
    assert (span.attributes["message"], span.outcome.value, span.result) == (str(error), outcome, None)
    sink = told.flushed()
    assert sink.counts[REQUESTS.name, outcome] == 1
    assert sink.counts[IMAGES.name, None] == 0
    assert dict(sink.observations) == {QUEUE_SECONDS.name: 0.25}


def test_a_request_that_no_engine_took_has_no_steps_and_waited_for_nothing() -> None:
    told = Told()
    told.reports.refused(INCOMING, RequestError("steps is 0, allowed are 1 …"))
    (line,), (span,) = told.log, told.spans.requests
    assert line["outcome"] == span.outcome.value == "refused"
    assert (span.timeline.steps, span.queue_seconds, span.result) == ([], 0.0, None)
    assert told.flushed().observations == []


def test_spans_that_can_not_be_made_are_a_line_in_the_log() -> None:
    told = Told(spans=Collected(failure=OSError("no collector")))
    told.reports.refused(INCOMING, RequestError("steps is 0"))
    request, bug = told.log
    assert (request["event"], bug["event"], bug["level"]) == ("request", "bug", "error")
    assert "no collector" in str(bug["message"])
