"""Whatever comes over the wire, the real server refuses it with what is allowed, and goes on serving the others."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from tritonclient.utils import InferenceServerException

from adacorr_deploy.serving.local_server import installed_triton
from adacorr_deploy.serving.repository import Repository
from adacorr_deploy.serving.trial_server import RunningServer, running
from tests.serving.conftest import MODEL
from tests.serving.scripted_engine import wait_until

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))

from hostile_calls import ANSWERED, HostileCall, hostile_calls, lethal_calls, send
from hostile_posts import HostilePost, hostile_posts

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(600)]

CALLS = hostile_calls(MODEL)
POSTS = hostile_posts(MODEL)
LETHAL = lethal_calls(MODEL)
REFUSED = 'adacorr_requests_total{outcome="refused"}'


@pytest.fixture(scope="module")
def server(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("hostile") / "log"
    with running(installed_triton(), repository, log) as started:
        yield started


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address, options=[("grpc.max_send_message_length", -1)]) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> int:
    return server.stub()


def check_alive(server: RunningServer, stub: int) -> None:
    """The same process serves on, and nothing of the request is left in it."""
    status = server.status()
    assert (status["queue_depth"], status["active_requests"], status["slot_bytes"]) == (0, 0, 0)
    assert server.stub() == stub


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_a_call_is_refused_with_what_is_allowed(
    server: RunningServer, channel: grpc.Channel, stub: int, case: HostileCall
) -> None:
    code, text = send(channel, case.message)
    assert code == case.code, text
    assert case.text in text
    assert len(text) < 1000  # a huge value is not sent back
    check_alive(server, stub)


def test_what_the_model_refuses_is_counted_and_the_rest_never_reaches_it(
    server: RunningServer, channel: grpc.Channel
) -> None:
    wait_until(lambda: server.metrics()[REFUSED] == logged_refusals(server))
    before = logged_refusals(server)
    for case in CALLS:
        send(channel, case.message)
    refused = sum(case.by_model for case in CALLS)
    assert refused > 20
    wait_until(lambda: server.metrics()[REFUSED] >= before + refused)
    assert server.metrics()[REFUSED] == logged_refusals(server) == before + refused


def logged_refusals(server: RunningServer) -> int:
    return sum(line.get("outcome") == "refused" for line in server.log_lines())


@pytest.mark.parametrize("case", POSTS, ids=lambda case: case.name)
def test_a_post_is_refused_with_what_is_allowed(server: RunningServer, stub: int, case: HostilePost) -> None:
    code, body = exchanged(server, case)
    assert code == case.code, body
    assert case.text in body
    assert "Traceback" not in body
    check_alive(server, stub)


def exchanged(server: RunningServer, case: HostilePost) -> tuple[int, str]:
    """Send a request over HTTP and say no more; return the answer's code, 0 for none, and its body."""
    with socket.create_connection(("127.0.0.1", server.ports.http), timeout=60) as connection:
        connection.sendall(case.on_the_wire())
        if not case.code:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body.decode("utf-8", "replace")


def test_requests_of_one_id_are_each_answered(server: RunningServer) -> None:
    with ThreadPoolExecutor(4) as clients:
        answers = list(
            clients.map(
                lambda seed: server.infer({"class_labels": [1], "seed": seed}, "latents", request_id="the same"),
                [1, 2, 1, 2],
            )
        )
    found = [answer.as_numpy("latents").tobytes() for answer in answers]
    assert found[0] == found[2] != found[1] == found[3]


def test_honest_requests_are_served_between_hostile_ones(server: RunningServer, channel: grpc.Channel) -> None:
    alone = server.latents({"class_labels": [2], "seed": 4}).tobytes()
    with ThreadPoolExecutor(4) as clients:
        hostile = [clients.submit(send, channel, case.message) for case in CALLS]
        honest = [clients.submit(server.latents, {"class_labels": [2], "seed": 4}) for _ in range(12)]
        assert [future.result()[0] for future in hostile] == [case.code for case in CALLS]
        assert {future.result().tobytes() for future in honest} == {alone}


def test_the_log_has_one_short_line_for_each(server: RunningServer, channel: grpc.Channel) -> None:
    before = len(server.log_lines())
    (long_id,) = [case for case in CALLS if case.name == "long id"]
    assert send(channel, long_id.message)[0] == ANSWERED
    wait_until(lambda: len(server.log_lines()) == before + 1)
    assert max(len(json.dumps(line)) for line in server.log_lines()) < 2000
    assert not [line for line in server.log_lines() if line["event"] == "bug"]


@pytest.mark.parametrize("message", LETHAL.values(), ids=list(LETHAL))
def test_what_ends_this_triton_is_noticed_by_inference(repository: Repository, tmp_path: Path, message: bytes) -> None:
    """Two calls end Triton 24.10 before the model sees them, as the repository's README says."""
    with running(installed_triton(), repository, tmp_path / "log") as server:
        with grpc.insecure_channel(server.grpc_address) as channel:
            assert send(channel, message)[0] in {"UNAVAILABLE", "INTERNAL"}
        with pytest.raises(InferenceServerException):
            server.infer({"command": "status"}, "event", client_timeout=5.0)
        server.process.kill()  # it would wait half a minute for the dead model
