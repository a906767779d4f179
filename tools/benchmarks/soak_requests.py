"""The kinds of requests that a soak mixes: each is sent, and says how it ended and what the server may log of it."""

from __future__ import annotations

import hashlib
import http.client
import json
import queue
import random
import socket
import struct
import time
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import grpc
import numpy as np
import tritonclient.grpc as triton
from hostile_calls import ANSWERED, HostileCall, hostile_calls, send
from numpy.typing import NDArray
from serving_sides import Asked, Sides, fingerprint, sampled
from tritonclient.utils import InferenceServerException

from adacorr_deploy.runtime.images import picture_from_pixels, png_from_picture
from adacorr_deploy.serving.metrics import Outcome
from adacorr_deploy.serving.tensors import Field
from adacorr_deploy.serving.trial_server import RunningServer, inputs_of, refusal

POLICIES: Final = ("none", "robust@2", "scheduled@2", "fora@3", "robust@3", "fewer-steps@2", "fora@2", "robust-lag")
POOL: Final = 120  # different requests
WAIT_SECONDS: Final = 60.0  # for an answer; a request that takes longer is lost
_SMALL_BYTES: Final = 200_000
_LEFT: Final = frozenset(
    {Outcome.DONE, Outcome.CANCELLED, None}
)  # the server may have noticed, or been done, or neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A request of the pool, and what it has to come to."""

    asked: Asked
    latents_sha256: str
    png_sha256: str  # of the first image
    latent_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What a client saw of one request.

    Attributes:
        name: Of the kind and of how it ended.
        outcomes: What the server may say of it; None stands for a request that its model never saw.
        fault: What is wrong with it.
        anonymous: Whether it went without its id, so that the server's word on it is only counted.
    """

    name: str
    outcomes: frozenset[Outcome | None]
    fault: str | None = None
    anonymous: bool = False


class Client:
    """A client's connections, which it makes anew now and then."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.grpc = server.client()
        self.http = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=WAIT_SECONDS)
        self.channel = grpc.insecure_channel(server.grpc_address)

    def close(self) -> None:
        self.grpc.close()
        self.http.close()
        self.channel.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a soak: what is to be asked, by whom, under which id."""

    client: Client
    id: str
    wish: Wish
    chance: random.Random

    @property
    def model(self) -> str:
        return self.client.server.model

    def infer(self, fields: Mapping[str, Field], seconds: float = WAIT_SECONDS) -> triton.InferResult:
        return self.client.grpc.infer(
            self.model, inputs_of(fields), outputs=_LATENTS, client_timeout=seconds, request_id=self.id
        )

    def answered(self, kind: str, latents: NDArray[np.float32]) -> Ending:
        wrong = fingerprint(latents) != self.wish.latents_sha256
        fault = f"{self.id} {kind} {self.wish.asked} came to another result" if wrong else None
        return Ending(name=f"{kind}: answered", outcomes=frozenset({Outcome.DONE}), fault=fault)


_LATENTS: Final = [triton.InferRequestedOutput("latents")]
_EVENT_TOO: Final = [*_LATENTS, triton.InferRequestedOutput("event")]


def pool(sides: Sides) -> list[Wish]:
    """Sample in process what the clients will ask for: few steps, each policy, one to three images."""
    chance = random.Random(0)  # noqa: S311  not for secrets
    wishes = []
    for index in range(POOL):
        policy = POLICIES[index % len(POLICIES)]
        calibrated = policy.partition("@")[0] in {"robust", "scheduled", "robust-lag"}
        asked = Asked(
            labels=tuple(chance.randrange(sides.classes) for _ in range(chance.choice((1, 1, 1, 2, 3)))),
            seed=chance.randrange(2**64),
            steps=sides.steps if calibrated else chance.choice((2, 3, 4, 6)),
            policy=policy,
        )
        latents = sampled(sides.engine, asked)
        png = hashlib.sha256(png_from_picture(picture_from_pixels(latents[0]))).hexdigest()
        wishes.append(
            Wish(asked=asked, latents_sha256=fingerprint(latents), png_sha256=png, latent_shape=latents.shape[1:])
        )
    return wishes


# --- Honest ------------------------------------------------------------------------------------------------------


def plain(request: Request) -> Ending:
    return request.answered("plain", request.infer(request.wish.asked.fields).as_numpy("latents"))


def over_http(request: Request) -> Ending:
    body = json.dumps({**request.wish.asked.fields, "outputs": ["png_base64"], "id": request.id})
    request.client.http.request("POST", f"/v2/models/{request.model}/generate", body)
    response = request.client.http.getresponse()
    answer = json.loads(response.read())
    files = answer.get("png_base64", [])
    first = files[0] if isinstance(files, list) else files
    right = hashlib.sha256(b64decode(first)).hexdigest() == request.wish.png_sha256
    return Ending(
        name=f"http: {response.status}",
        outcomes=frozenset({Outcome.DONE}),
        fault=None if right else f"{request.id} {request.wish.asked} over HTTP came to another image: {answer.keys()}",
    )


def streamed(request: Request) -> Ending:
    """Follow the progress to the end."""
    messages = _open_stream(request)
    try:
        while True:
            result, error = messages.get(timeout=WAIT_SECONDS)
            if error is not None:
                return _unwanted("stream", request, error)
            if json.loads(result.as_numpy("event")[0])["type"] == "result":
                return request.answered("stream", result.as_numpy("latents"))
    finally:
        request.client.grpc.stop_stream()


def late(request: Request) -> Ending:
    """Have a deadline that is hard to keep."""
    try:
        result = request.infer({**request.wish.asked.fields, "timeout_ms": request.chance.randint(1, 30)})
    except InferenceServerException as error:
        code, text = refusal(error)
        if code != "CANCELLED" or "deadline passed" not in text:
            return _unwanted("late", request, error)
        return Ending(name=f"late: {code}", outcomes=frozenset({Outcome.TIMED_OUT}))
    return request.answered("late", result.as_numpy("latents"))


# --- Clients that go ---------------------------------------------------------------------------------------------


def leaves(request: Request) -> Ending:
    """Wait no longer than some milliseconds."""
    try:
        result = request.infer(request.wish.asked.fields, request.chance.uniform(0.001, 0.03))
    except InferenceServerException as error:
        code, _ = refusal(error)
        return Ending(name=f"leaves: {code}", outcomes=_LEFT, fault=_unless(code, "DEADLINE_EXCEEDED", "CANCELLED"))
    return request.answered("leaves", result.as_numpy("latents"))


def cancels(request: Request) -> Ending:
    answers: queue.SimpleQueue[tuple[triton.InferResult, InferenceServerException | None]] = queue.SimpleQueue()
    context = request.client.grpc.async_infer(
        request.model,
        inputs_of(request.wish.asked.fields),
        callback=lambda result, error: answers.put((result, error)),
        outputs=_LATENTS,
        request_id=request.id,
    )
    time.sleep(request.chance.uniform(0, 0.02))
    context.cancel()
    result, error = answers.get(timeout=WAIT_SECONDS)
    if error is None:
        return request.answered("cancels", result.as_numpy("latents"))
    code, _ = refusal(error)
    return Ending(name=f"cancels: {code}", outcomes=_LEFT, fault=_unless(code, "CANCELLED"))


def leaves_stream(request: Request) -> Ending:
    """Read a stream's first message at most."""
    messages = _open_stream(request)
    if request.chance.random() < 0.5:
        messages.get(timeout=WAIT_SECONDS)
    request.client.grpc.stop_stream(cancel_requests=True)
    return Ending(name="stream: left", outcomes=_LEFT)


def hangs_up(request: Request) -> Ending:
    """Break a connection off in the middle of a request, or right after it, as a process that dies does."""
    with socket.create_connection(("127.0.0.1", request.client.server.ports.http), timeout=WAIT_SECONDS) as connection:
        body = json.dumps({**request.wish.asked.fields, "outputs": ["latents"], "id": request.id}).encode()
        head = f"POST /v2/models/{request.model}/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        connection.sendall(whole[: request.chance.choice((len(whole), len(whole) - 10, len(head)))])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not an orderly end
    return Ending(name="http: hung up", outcomes=_LEFT)


def closes_channel(request: Request) -> Ending:
    """Close the connection under a call."""
    client = request.client.server.client()
    client.async_infer(
        request.model,
        inputs_of(request.wish.asked.fields),
        callback=lambda result, error: None,
        outputs=_LATENTS,
        request_id=request.id,
    )
    time.sleep(request.chance.uniform(0, 0.01))
    client.close()
    return Ending(name="grpc: closed", outcomes=_LEFT)


# --- Not to be answered ------------------------------------------------------------------------------------------

BAD: Final[Sequence[dict[str, Field]]] = (
    {"class_labels": [100_000]},
    {"class_labels": [-1]},
    {"steps": 0},
    {"steps": 100_000},
    {"policy": "../../etc/passwd"},
    {"guidance": 0.0},
    {"sampler": "none"},
    {"outputs": ["jpeg"]},
)


def bad(request: Request) -> Ending:
    fields = {**request.wish.asked.fields, **request.chance.choice(BAD)}
    refused = frozenset[Outcome | None]({Outcome.REFUSED})
    try:
        request.infer(fields)
    except InferenceServerException as error:
        code, _ = refusal(error)
        return Ending(name=f"bad: {code}", outcomes=refused, fault=_unless(code, "INVALID_ARGUMENT"))
    return Ending(name="bad: answered", outcomes=refused, fault=f"{request.id} {fields} was answered")


def hostile(request: Request) -> Ending:
    """Send something of the table."""
    case = request.chance.choice(hostile_cases(request.model))
    code, text = send(request.client.channel, case.message)
    outcome = Outcome.DONE if case.code == ANSWERED else Outcome.REFUSED if case.by_model else None
    fine = code == case.code and case.text in text
    return Ending(
        name=f"hostile: {code}",
        outcomes=frozenset({outcome}),
        fault=None if fine else f"hostile {case.name}: {code} {text[:300]}",
        anonymous=True,
    )


@cache
def hostile_cases(model: str) -> Sequence[HostileCall]:
    """Return those of the table that are small enough to be sent often."""
    return [case for case in hostile_calls(model) if len(case.message) <= _SMALL_BYTES]


def nan(request: Request) -> Ending:
    """Start from numbers whose sum is beyond float32."""
    latents: NDArray[np.float32] = np.full((1, *request.wish.latent_shape), 3e38, dtype=np.float32)
    failed = frozenset[Outcome | None]({Outcome.FAILED})
    try:
        request.infer({"class_labels": [1], "policy": "none", "latents": latents})
    except InferenceServerException as error:
        code, text = refusal(error)
        fault = None if code == "INTERNAL" and "NaN" in text else f"{request.id} NaN: {code} {text}"
        return Ending(name=f"nan: {code}", outcomes=failed, fault=fault)
    return Ending(name="nan: answered", outcomes=failed, fault=f"{request.id} NaN was answered")


# --- Helpers -----------------------------------------------------------------------------------------------------

Message = tuple[triton.InferResult, InferenceServerException | None]


def _open_stream(request: Request) -> queue.SimpleQueue[Message]:
    messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
    fields = {**request.wish.asked.fields, "outputs": ["latents"]}
    request.client.grpc.start_stream(callback=lambda result, error: messages.put((result, error)))
    request.client.grpc.async_stream_infer(
        f"{request.model}_stream", inputs_of(fields), outputs=_EVENT_TOO, request_id=request.id
    )
    return messages


def _unwanted(kind: str, request: Request, error: InferenceServerException) -> Ending:
    code, text = refusal(error)
    return Ending(
        name=f"{kind}: {code}", outcomes=_LEFT, fault=f"{request.id} {kind} {request.wish.asked}: {code} {text}"
    )


def _unless(code: str, *allowed: str) -> str | None:
    return None if code in allowed else f"ended with {code}, expected {' or '.join(allowed)}"


KINDS: Final[Mapping[Callable[[Request], Ending], int]] = {  # with their shares, in percent
    plain: 56,
    over_http: 7,
    streamed: 6,
    late: 5,
    leaves: 4,
    cancels: 4,
    leaves_stream: 2,
    hangs_up: 2,
    closes_channel: 2,
    bad: 5,
    hostile: 6,
    nan: 1,
}
