"""On a real Triton server: what a client gets is what sampling in process gives, and trouble stays where it belongs."""

from __future__ import annotations

import base64
import json
import os
import queue
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.runtime import Pipeline, SampleRequest, batch_ticket
from adacorr_deploy.runtime.batching import BatchingEngine
from adacorr_deploy.runtime.images import picture_from_pixels, png_from_picture
from adacorr_deploy.serving.local_server import installed_triton
from adacorr_deploy.serving.metrics import METRICS, Outcome
from adacorr_deploy.serving.repository import Repository
from adacorr_deploy.serving.tensors import Field
from adacorr_deploy.serving.trial_server import RunningServer, inputs_of, refusal, running
from tests.cli.conftest import STEPS
from tests.serving.conftest import MAX_QUEUE
from tests.serving.scripted_engine import wait_until

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(600)]

LONG: dict[str, Field] = {"class_labels": [0, 1, 2, 0], "steps": 1000, "policy": "none"}  # seconds of work
TRACING = ("--trace-config=mode=opentelemetry", "--trace-config=rate=1", "--trace-config=level=TIMESTAMPS",
           "--trace-config=opentelemetry,url=127.0.0.1:9/v1/traces")  # fmt: skip
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def server(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(installed_triton(), repository, log, TRACING) as started:
        yield started


@pytest.fixture(scope="module")
def in_process(served_bundle: Bundle) -> Iterator[BatchingEngine]:
    with Pipeline.open(served_bundle.path) as pipeline, BatchingEngine(pipeline) as engine:
        yield engine


def sampled(engine: BatchingEngine, fields: dict[str, Field]) -> NDArray[np.float32]:
    """Return what the same request comes to in this process, alone."""
    labels, steps, seed, policy = (fields.get(name) for name in ("class_labels", "steps", "seed", "policy"))
    assert isinstance(labels, list)
    request = SampleRequest(
        tuple(int(label) for label in labels),
        steps=steps if isinstance(steps, int) else STEPS,
        seed=seed if isinstance(seed, int) else 0,
    )
    done: queue.Queue[batch_ticket.Outcome] = queue.Queue()
    engine.submit(request, policy_named(policy if isinstance(policy, str) else "robust"), on_done=done.put)
    result = done.get(timeout=60).result
    assert result is not None
    return result.latents


# --- Requests ----------------------------------------------------------------------------------------------------


def test_requests_of_many_clients_give_what_each_gives_alone_in_process(
    server: RunningServer, in_process: BatchingEngine
) -> None:
    policies = ["none", "robust", "robust@2.5", "scheduled@2", "fora@2", "fewer-steps@2", "robust-lag"]
    requests: list[dict[str, Field]] = [
        {"class_labels": [index % 3] * (1 + index % 3), "seed": index, "policy": policies[index % len(policies)]}
        for index in range(21)
    ]
    requests += [{"class_labels": [1], "steps": 5 + index, "seed": 7, "policy": "fora@3"} for index in range(3)]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(server.latents, requests))
    for fields, latents in zip(requests, found, strict=True):
        np.testing.assert_array_equal(latents, sampled(in_process, fields), err_msg=str(fields))


def test_images_come_as_files_bytes_and_numbers(server: RunningServer) -> None:
    fields: dict[str, Field] = {"class_labels": [2, 1], "seed": 3}
    result = server.infer(fields, "png", "pixels", "latents", "rho", "launches", "steps", "policy")
    latents = result.as_numpy("latents")
    assert list(result.as_numpy("png")) == [png_from_picture(picture_from_pixels(image)) for image in latents]
    assert result.as_numpy("pixels").shape == (2, 12, 12, 1)
    assert 0 < result.as_numpy("rho")[0] < 1
    assert result.as_numpy("launches")[0] == round((1 - result.as_numpy("rho")[0]) * STEPS * 3)
    assert (result.as_numpy("steps")[0], result.as_numpy("policy")[0]) == (STEPS, b"robust")


def test_a_request_without_outputs_gets_files(server: RunningServer) -> None:
    result = server.infer({"class_labels": [2]})
    assert result.as_numpy("png")[0].startswith(b"\x89PNG")
    assert result.as_numpy("latents") is None


def test_json_clients_are_served(server: RunningServer) -> None:
    code, body = server.post(f"{server.model}/generate", {"class_labels": [1], "seed": 5, "outputs": ["png_base64"]})
    assert code == 200
    answer = json.loads(body)
    (expected,) = server.infer({"class_labels": [1], "seed": 5}, "png").as_numpy("png")
    assert base64.b64decode(answer["png_base64"]) == expected
    code, body = server.post(f"{server.model}/generate", {"class_labels": [1], "sede": 5})
    assert (code, json.loads(body)["error"][:30]) == (400, "'sede' is no field of a reques")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_labels": [3]}, "class_labels[0] is 3, allowed are whole numbers from 0 to 2."),
        ({"class_labels": [0] * 5}, "the number of class_labels is 5, allowed are whole numbers from 1 to 4."),
        ({"class_labels": [0], "steps": 1001}, "steps is 1001, allowed are whole numbers from 1 to "),
        ({"class_labels": [0], "policy": "/etc/passwd"}, "policy is '/etc/passwd', allowed are none, fewer-steps"),
        ({"class_labels": [0], "steps": 9}, "policy robust"),
        ({"seed": 1}, "class_labels: Field required"),
    ],
)
def test_a_malformed_request_is_refused_with_what_is_allowed(
    server: RunningServer, fields: dict[str, Field], message: str
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        server.infer(fields)
    code, text = refusal(refused.value)
    assert code == "INVALID_ARGUMENT"
    assert message in text


# --- Trouble -----------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_clients_that_cancel_free_it(server: RunningServer) -> None:
    answers: queue.Queue[InferenceServerException] = queue.Queue()
    client = server.client()
    contexts = [
        client.async_infer(server.model, inputs_of(LONG), callback=lambda result, error: answers.put(error))
        for _ in range(MAX_QUEUE + 20)
    ]
    code, text = refusal(answers.get(timeout=30))
    assert code == "UNAVAILABLE"
    assert text.startswith(f"{MAX_QUEUE} requests are waiting already")
    for context in contexts:
        context.cancel()
    wait_until(lambda: server.status()["active_requests"] == 0)
    status = server.status()
    assert (status["queue_depth"], status["slot_bytes"]) == (0, 0)
    client.close()
    assert server.latents({"class_labels": [1]}).shape == (1, 1, 12, 12)


def test_a_deadline_ends_a_request(server: RunningServer) -> None:
    with pytest.raises(InferenceServerException) as late:
        server.infer({**LONG, "timeout_ms": 50})
    code, text = refusal(late.value)
    assert code == "CANCELLED"
    assert "deadline passed" in text


def test_a_client_that_is_killed_frees_its_slots(server: RunningServer) -> None:
    script = f"""
import sys
from adacorr_deploy.serving.trial_server import inputs_of
import tritonclient.grpc as triton
client = triton.InferenceServerClient("{server.grpc_address}")
client.async_infer("{server.model}", inputs_of({LONG!r}), callback=print, request_id="killed")
print("sent", flush=True)
sys.stdin.read()
"""
    client = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"sent\n"
    wait_until(lambda: server.status()["active_requests"] == 1)
    client.kill()
    client.communicate()
    wait_until(lambda: (server.status()["active_requests"], server.status()["slot_bytes"]) == (0, 0))
    wait_until(lambda: any(line.get("request_id") == "killed" for line in server.log_lines()))
    assert [line["outcome"] for line in server.log_lines() if line.get("request_id") == "killed"] == ["cancelled"]


def test_nan_fails_its_request_alone(server: RunningServer, in_process: BatchingEngine) -> None:
    huge: NDArray[np.float32] = np.full((1, 1, 12, 12), 3e38, dtype=np.float32)
    with ThreadPoolExecutor(4) as clients:
        fine: list[dict[str, Field]] = [{"class_labels": [1], "seed": seed} for seed in range(6)]
        futures = [clients.submit(server.latents, fields) for fields in fine]
        with pytest.raises(InferenceServerException) as failed:
            server.infer({"class_labels": [1], "latents": huge})
        found = [future.result() for future in futures]
    code, text = refusal(failed.value)
    assert code == "INTERNAL"
    assert "NaN" in text
    for fields, latents in zip(fine, found, strict=True):
        np.testing.assert_array_equal(latents, sampled(in_process, fields))


# --- Streams -----------------------------------------------------------------------------------------------------

Message = tuple[triton.InferResult, InferenceServerException | None]


def opened_stream(
    server: RunningServer, fields: dict[str, Field]
) -> tuple[triton.InferenceServerClient, queue.Queue[Message]]:
    messages: queue.Queue[Message] = queue.Queue()
    client = server.client()
    client.start_stream(callback=lambda result, error: messages.put((result, error)))
    client.async_stream_infer(f"{server.model}_stream", inputs_of(fields))
    return client, messages


def test_a_stream_shows_progress_and_previews_and_ends_with_the_result(server: RunningServer) -> None:
    fields: dict[str, Field] = {"class_labels": [2], "seed": 9, "steps": 300, "policy": "none"}
    client, messages = opened_stream(server, {**fields, "outputs": ["latents"], "preview_every": 20})
    steps, previews, kind = [], 0, "progress"
    while kind == "progress":
        result, error = messages.get(timeout=60)
        assert error is None
        event = json.loads(result.as_numpy("event")[0])
        kind = event["type"]
        steps.append(event.get("step", 300))
        previews += result.as_numpy("latents") is not None
    client.stop_stream()
    assert kind == "result"
    assert steps == sorted(steps)
    assert len(steps) > 2
    assert previews > 2  # a slow reader skips some
    np.testing.assert_array_equal(result.as_numpy("latents"), server.latents(fields))


def test_a_stream_that_is_left_ends_its_request(server: RunningServer) -> None:
    client, messages = opened_stream(server, LONG)
    messages.get(timeout=30)
    client.stop_stream(cancel_requests=True)
    wait_until(lambda: (server.status()["active_requests"], server.status()["streams"]) == (0, 0))


def test_streams_come_over_http_too(server: RunningServer) -> None:
    code, body = server.post(f"{server.model}_stream/generate_stream", {"class_labels": [0], "outputs": ["png_base64"]})
    assert code == 200
    events = [json.loads(line.removeprefix("data: ")) for line in body.decode().splitlines() if line]
    assert json.loads(events[-1]["event"]) == {"type": "result"}
    assert base64.b64decode(events[-1]["png_base64"]).startswith(b"\x89PNG")


def test_a_stream_is_refused_as_a_plain_request_is(server: RunningServer) -> None:
    client, messages = opened_stream(server, {"class_labels": [3]})
    _, error = messages.get(timeout=30)
    client.stop_stream()
    assert error is not None
    assert "class_labels[0] is 3" in str(error.message())


# --- Seen from outside -------------------------------------------------------------------------------------------


def counted(server: RunningServer) -> dict[str, int]:
    """Return how requests ended, as the metrics say."""
    series = ((outcome.value, f'adacorr_requests_total{{outcome="{outcome.value}"}}') for outcome in Outcome)
    metrics = server.metrics()
    return {outcome: int(metrics[name]) for outcome, name in series}


def logged(server: RunningServer) -> dict[str, int]:
    """Return how requests ended, as the log says."""
    ended = Counter(str(line["outcome"]) for line in server.log_lines() if line["event"] == "request")
    return {outcome.value: ended[outcome.value] for outcome in Outcome}


def test_every_metric_is_shown_and_outcomes_are_counted(server: RunningServer) -> None:
    wait_until(lambda: counted(server) == logged(server))
    before = server.metrics()
    server.infer({"class_labels": [1, 2]}, "rho")
    with pytest.raises(InferenceServerException):
        server.infer({"class_labels": [9]})
    wait_until(lambda: sum(counted(server).values()) == sum(logged(server).values()))
    assert counted(server) == logged(server)
    after = server.metrics()
    assert after['adacorr_requests_total{outcome="refused"}'] == before['adacorr_requests_total{outcome="refused"}'] + 1
    assert after["adacorr_images_total"] == before["adacorr_images_total"] + 2
    assert after["adacorr_request_seconds_count"] == before["adacorr_request_seconds_count"] + 1
    assert after["adacorr_step_seconds_count"] > before["adacorr_step_seconds_count"]
    assert after["adacorr_block_launches_total"] > before["adacorr_block_launches_total"]
    assert 0 < after["adacorr_batch_occupancy"] <= 1
    assert {name.partition("{")[0] for name in after} == {name for metric in METRICS for name in metric.series}


def test_a_request_is_logged_with_its_id_and_its_trace(server: RunningServer) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}
    server.infer({"class_labels": [1]}, "rho", request_id="seen", headers=headers)
    wait_until(lambda: any(line.get("request_id") == "seen" for line in server.log_lines()))
    (line,) = [line for line in server.log_lines() if line.get("request_id") == "seen"]
    assert (line["outcome"], line["images"], line["policy"], line["trace_id"]) == ("done", 1, "robust", TRACE_ID)


# --- Life and death ----------------------------------------------------------------------------------------------


def healthcheck(server: RunningServer, repository: Repository) -> int:
    command = [sys.executable, str(repository.path / "healthcheck.py"), server.grpc_address]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


def test_the_client_example_fetches_images(server: RunningServer, repository: Repository, tmp_path: Path) -> None:
    command = [sys.executable, str(repository.path / "client.py"), "--server", server.grpc_address, "0", "2"]
    for extra in ([], ["--stream", "--policy", "robust@2"]):
        subprocess.run([*command, *extra, "--output", str(tmp_path / "images")], check=True, timeout=60)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["00_class0.png", "01_class2.png"]


def test_a_probe_by_inference_notices_that_the_model_has_died(repository: Repository, tmp_path: Path) -> None:
    with running(installed_triton(), repository, tmp_path / "log") as server:
        assert healthcheck(server, repository) == 0
        os.kill(server.stub(), signal.SIGKILL)
        assert healthcheck(server, repository) == 1
        assert server.is_ready()  # Triton's own health does not
        server.process.kill()  # it would wait half a minute for the dead model


def test_sigterm_drains(repository: Repository, in_process: BatchingEngine, tmp_path: Path) -> None:
    fields: dict[str, Field] = {"class_labels": [0, 1], "steps": 500, "policy": "none"}
    with running(installed_triton(), repository, tmp_path / "log") as server, ThreadPoolExecutor(3) as clients:
        started = [clients.submit(server.latents, {**fields, "seed": seed}) for seed in range(3)]
        wait_until(lambda: server.status()["active_requests"] == 3)
        server.process.send_signal(signal.SIGTERM)
        for seed, future in enumerate(started):
            np.testing.assert_array_equal(future.result(timeout=60), sampled(in_process, {**fields, "seed": seed}))
        assert server.process.wait(timeout=60) == 0
        assert [line["event"] for line in server.log_lines()][-1] == "stopped"


def test_engines_that_do_not_fit_stop_the_load_with_the_command_that_rebuilds(
    repository: Repository, tmp_path: Path
) -> None:
    config = repository.path / repository.model / "configs" / "cpu.pbtxt"
    text, server = config.read_text(), installed_triton()
    config.write_text(text.replace('"onnxruntime"', '"tensorrt"'))
    try:
        with pytest.raises(EngineError, match="did not come up"), running(server, repository, tmp_path / "log"):
            pass
    finally:
        config.write_text(text)
    log = (tmp_path / "log").read_text()
    assert "Rebuild them for this machine with: adacorr-build MODEL -o NEW.bundle" in log
    assert "failed to load" in log
