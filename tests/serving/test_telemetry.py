"""Spans: whose children they are, and what they tell; on the real server with a stand-in for a collector."""

from __future__ import annotations

import http.client
import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from adacorr_deploy.serving.local_server import installed_triton
from adacorr_deploy.serving.repository import Repository
from adacorr_deploy.serving.telemetry import (
    ENDPOINTS,
    Timeline,
    trace_id,
    traceparent_from,
    tracing_from_environment,
)
from adacorr_deploy.serving.trial_server import RunningServer, running
from tests.cli.conftest import STEPS
from tests.serving.scripted_engine import SECONDS

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
BLOCKS = 3
Span = Mapping[str, object]

# --- Whose child a request is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "parameters", "expected"),
    [
        (json.dumps({"traceparent": PARENT}), {}, PARENT),
        (json.dumps({"traceparent": PARENT}), {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}, PARENT),
        ("", {"traceparent": PARENT}, PARENT),
        (None, {"Traceparent": PARENT}, PARENT),
        ("{}", {}, None),
        ("[]", {}, None),
        ("[" * 100_000, {"traceparent": PARENT}, PARENT),
        (7, {"traceparent": 7}, None),
        (None, {"traceparent": f"{PARENT}\n"}, None),
        (None, {"traceparent": PARENT.upper()}, None),
        (None, {"traceparent": "00-" + "x" * 1_000_000}, None),
    ],
)
def test_the_servers_span_comes_first_and_what_is_malformed_is_none(
    context: str | int | None, parameters: dict[str, str | int], expected: str | None
) -> None:
    found = traceparent_from(context, parameters)
    assert found == expected
    assert trace_id(found) == (TRACE if expected else None)


def test_a_timeline_keeps_so_many_steps_at_most() -> None:
    timeline = Timeline()
    for _ in range(3000):
        timeline.stepped(0.5)
    assert len(timeline.steps) == 1000


def test_without_a_collector_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ENDPOINTS, "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    tracing, obstacle = tracing_from_environment("tiny")
    assert tracing is None
    assert obstacle is None


def test_a_collector_that_can_not_be_had_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINTS[1], "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    tracing, obstacle = tracing_from_environment("tiny")
    assert tracing is None
    assert obstacle == "OTEL_EXPORTER_OTLP_PROTOCOL is grpc, allowed is http/protobuf. No spans are sent."
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing_from_environment("tiny")[1] is None


# --- On the real server ------------------------------------------------------------------------------------------

on_triton = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(600)]


class Spans:
    """What the collector got."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._arrived: queue.SimpleQueue[Span] = queue.SimpleQueue()
        self._known: list[Span] = []
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterator[bytes]) -> None:
        for line in lines:
            self._arrived.put(json.loads(line))

    def of_request(self, request_id: str) -> tuple[Span, list[Span]]:
        """Wait for a request's span, and return it with its children in their order."""
        while True:
            for span in self._known:
                if attributes(span).get("adacorr.request_id") == request_id:
                    children = [each for each in self._known if each["parent_span_id"] == span["span_id"]]
                    return span, sorted(children, key=lambda each: int(str(attributes(each)["adacorr.step"])))
            self._known.append(self._arrived.get(timeout=SECONDS))  # children end before their parent


def attributes(span: Span) -> dict[str, object]:
    listed = span.get("attributes", [])
    assert isinstance(listed, list)
    return {each["key"]: _value(each["value"]) for each in listed}


def _value(value: dict[str, object]) -> object:
    ((kind, inner),) = value.items()
    if kind == "arrayValue":
        assert isinstance(inner, dict)
        return [_value(each) for each in inner["values"]]
    return int(str(inner)) if kind == "intValue" else inner


@contextmanager
def collector() -> Iterator[tuple[str, Spans]]:
    python = installed_triton().python
    assert python is not None
    script = Path(__file__).with_name("collector.py")
    with subprocess.Popen([str(python), str(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield f"http://127.0.0.1:{port}", Spans(iter(process.stdout.readline, b""))
        process.kill()


@pytest.fixture(scope="module")
def traced(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Spans]]:
    with pytest.MonkeyPatch.context() as patch, collector() as (endpoint, spans):
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")  # ms
        with running(installed_triton(), repository, tmp_path_factory.mktemp("traced") / "log") as server:
            yield server, spans


@pytest.mark.parametrize("caller", ["gRPC", "infer", "generate", "stream"])
class TestOnTriton:
    pytestmark = on_triton

    def test_a_request_and_its_steps_are_children_of_the_callers_span(
        self, traced: tuple[RunningServer, Spans], caller: str
    ) -> None:
        server, spans = traced
        ask(server, caller)
        request, steps = spans.of_request(caller)
        assert (request["trace_id"], request["parent_span_id"]) == (TRACE, CALLER)
        assert {step["trace_id"] for step in steps} == {TRACE}
        about = attributes(request)
        assert (
            about.items()
            >= {
                "adacorr.outcome": "done",
                "adacorr.policy": "robust",
                "adacorr.images": 2,
                "adacorr.steps": STEPS,
            }.items()
        )
        assert "adacorr-deploy/tiny" in json.dumps(request["resource"])
        assert [attributes(step)["adacorr.step"] for step in steps] == [*range(STEPS)]
        assert sum(int(str(attributes(step)["adacorr.launches"])) for step in steps) == about["adacorr.launches"]
        assert attributes(steps[-1])["adacorr.rho"] == about["adacorr.rho"]
        decisions = [attributes(step)["adacorr.decisions"] for step in steps]
        assert all(isinstance(of_step, list) and len(of_step) == BLOCKS for of_step in decisions)
        assert any("reuse" in str(of_step) for of_step in decisions)
        times = [(int(str(step["startTimeUnixNano"])), int(str(step["endTimeUnixNano"]))) for step in steps]
        assert all(before[1] == after[0] for before, after in pairwise(times))
        assert int(str(request["startTimeUnixNano"])) <= times[0][0]
        assert times[-1][1] <= int(str(request["endTimeUnixNano"]))


def ask(server: RunningServer, caller: str) -> None:
    """Send a request that a span of the caller's belongs to; `generate` of 24.10 reads no headers, so it is a field."""
    headers = {"traceparent": PARENT}
    if caller == "gRPC":
        server.infer({"class_labels": [1, 2]}, "rho", request_id=caller, headers=headers)
        return
    labels = {"name": "class_labels", "shape": [2], "datatype": "INT64", "data": [1, 2]}
    generated = {"class_labels": [1, 2], "outputs": ["png_base64"], "traceparent": PARENT}
    path, body = {
        "infer": (f"{server.model}/infer", {"inputs": [labels], "outputs": [{"name": "rho"}]}),
        "generate": (f"{server.model}/generate", generated),
        "stream": (f"{server.model}_stream/generate_stream", generated),
    }[caller]
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=60)
    connection.request("POST", f"/v2/models/{path}", json.dumps({**body, "id": caller}), headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    response.read()
    connection.close()


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_refused_request_is_a_span_with_its_error(traced: tuple[RunningServer, Spans]) -> None:
    server, spans = traced
    with pytest.raises(InferenceServerException):
        server.infer({"class_labels": [9]}, "rho", request_id="refused")
    request, steps = spans.of_request("refused")
    assert steps == []
    assert attributes(request)["adacorr.outcome"] == "refused"
    status = request["status"]
    assert isinstance(status, dict)
    assert status["code"] == "STATUS_CODE_ERROR"
    assert "class_labels[0] is 9, allowed are" in status["message"]
    assert not request["parent_span_id"]  # nobody named one: a trace of its own


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_collector_that_is_away_costs_no_request_anything(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    with running(installed_triton(), repository, tmp_path / "log") as server:
        for seed in range(5):
            assert server.latents({"class_labels": [1], "seed": seed}).shape == (1, 1, 12, 12)
