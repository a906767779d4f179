"""Every request gets one answer, is counted by how it ended, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import UNCALIBRATED
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import (
    AdaCorrError,
    CalibrationError,
    DeadlineExceededError,
    EngineError,
    PolicyError,
    QueueFullError,
    SamplingCancelledError,
)
from adacorr_deploy.runtime import Prompts
from adacorr_deploy.runtime.measurements import calibrations
from adacorr_deploy.serving.logs import JsonLog
from adacorr_deploy.serving.metrics import (
    GUARD_TRIPS,
    LAUNCHES,
    QUEUE_DEPTH,
    REQUESTS,
    RHO,
    STEP_SECONDS,
    Recorder,
)
from adacorr_deploy.serving.orders import Order, OrderBook
from adacorr_deploy.serving.prompt_desk import PromptDesk, Texts
from adacorr_deploy.serving.replies import GuardedReply, Incoming, Status
from adacorr_deploy.serving.reports import Reports
from adacorr_deploy.serving.service import SamplingService
from adacorr_deploy.serving.tensors import OUTPUTS, Field, Tensors, text_tensor
from tests.serving.scripted_engine import SECONDS, Client, CountingSink, ScriptedEngine, wait_until

ALL = frozenset(field.name for field in OUTPUTS)


class Bench:
    """A service with everything around it in a test's hands."""

    def __init__(self, book: OrderBook) -> None:
        self.engine, self.sink, self.lines = ScriptedEngine(), CountingSink(), io.StringIO()
        self.reports = Reports(recorder=Recorder(self.sink), log=JsonLog("tiny", self.lines))
        self.service = SamplingService(self.engine, book, self.reports)

    def ask(
        self,
        tensors: Tensors | None = None,
        *,
        wanted: frozenset[str] = ALL,
        parameters: Mapping[str, str | int | float | bool] | None = None,
    ) -> Client:
        client = Client()
        given = {"class_labels": np.array([1, 2])} if tensors is None else tensors
        incoming = Incoming(request_id="r1", tensors=lambda: given, parameters=parameters or {}, wanted=wanted)
        self.service.handle(incoming, client)
        return client

    @property
    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]

    def outcomes(self) -> dict[str | None, int]:
        self.service.close()
        return {label: count for (name, label), count in self.sink.counts.items() if name == REQUESTS.name}


@pytest.fixture
def bench(book: OrderBook) -> Iterator[Bench]:
    made = Bench(book)
    with made.service:
        yield made


def test_a_client_is_told_what_to_ask_in_place_of_an_uncalibrated_run_and_the_log_the_command(
    book: OrderBook, served_bundle: Bundle
) -> None:
    bench = Bench(book)
    held = [*calibrations(served_bundle).values()]
    command = "policy robust needs a calibration. Make one with: adacorr-calibrate /srv/secret.bundle --steps 9"
    bench.engine.refusal = CalibrationError(command)
    bench.service = SamplingService(bench.engine, book, bench.reports, calibrations=[*held, *held])
    with bench.service:
        client = bench.ask({"class_labels": np.array([1]), "steps": np.array([9])})
    status, text = client.failure
    assert status is Status.INVALID
    assert text == (
        "policy robust needs a calibration that this server doesn't hold for ddim with 9 steps and guidance 4. "
        "Ask for a run that it is calibrated for (ddim with 8 steps and guidance 4), or for a policy that needs none: "
        f"{UNCALIBRATED}, or quality exact."
    )
    assert [line["message"] for line in bench.log] == [command]


@pytest.mark.parametrize(("policy", "steps"), [("robust-blocks", 9), ("teacache", 8)])
def test_a_client_is_not_sent_to_a_run_that_its_policy_would_be_refused_for_too(
    book: OrderBook, served_bundle: Bundle, policy: str, steps: int
) -> None:
    """The bundle's calibration is robust's: of another predictor, and without a profile."""
    bench = Bench(book)
    bench.engine.refusal = CalibrationError("the command")
    held = [*calibrations(served_bundle).values()]
    bench.service = SamplingService(bench.engine, book, bench.reports, calibrations=held)
    with bench.service:
        asked = {"class_labels": np.array([1]), "steps": np.array([steps]), "policy": text_tensor([policy])}
        client = bench.ask(asked)
    status, text = client.failure
    assert status is Status.INVALID
    assert text == (
        f"policy {policy} needs a calibration that this server doesn't hold for ddim with {steps} steps and guidance "
        f"4. Ask for a policy that needs none: {UNCALIBRATED}, or quality exact."
    )


def command(name: str, stream: str | None = None) -> Tensors:
    return {"command": text_tensor([name]), **({} if stream is None else {"stream": text_tensor([stream])})}


def event(client: Client) -> dict[str, object]:
    values: dict[str, object] = json.loads(client.tensors["event"][0])
    return values


def test_a_result_comes_with_what_it_took(bench: Bench) -> None:
    client = bench.ask(wanted=frozenset({"latents", "rho"}))
    (job,) = bench.engine.jobs
    job.step(1)
    job.step(2)
    job.finish()
    assert client.tensors["latents"].shape == (2, 1, 4, 4)
    assert "png" not in client.tensors
    assert [client.tensors[name][0] for name in ("rho", "launches", "queue_seconds")] == [0.5, 7, 0.25]
    assert bench.outcomes() == {"done": 1}
    assert (RHO.name, 0.5) in bench.sink.observations
    assert sum(name == STEP_SECONDS.name for name, _ in bench.sink.observations) == 1
    assert bench.sink.counts[LAUNCHES.name, None] == 40  # the engine's own count, once
    assert bench.sink.counts[GUARD_TRIPS.name, None] == 4
    assert bench.sink.gauges[QUEUE_DEPTH.name] == 1
    (line,) = bench.log
    assert (line["request_id"], line["outcome"], line["policy"], line["rho"]) == ("r1", "done", "robust", 0.5)


@pytest.mark.parametrize(
    ("error", "status", "outcome"),
    [
        (EngineError("The latents hold NaN."), Status.INTERNAL, "failed"),
        (SamplingCancelledError("Cancelled."), Status.CANCELLED, "cancelled"),
        (DeadlineExceededError("Too late."), Status.CANCELLED, "timed_out"),
        (PolicyError("Nothing to reuse."), Status.INVALID, "refused"),
    ],
)
def test_an_error_of_the_engine_fails_its_request_alone(
    bench: Bench, error: AdaCorrError, status: Status, outcome: str
) -> None:
    failed, fine = bench.ask(), bench.ask()
    first, second = bench.engine.jobs
    first.fail(error)
    second.finish()
    assert failed.failure == (status, str(error))
    assert fine.tensors["launches"] == [7]
    assert bench.outcomes() == {outcome: 1, "done": 1}


def test_a_missing_calibration_that_is_found_later_is_told_as_one_found_at_once(bench: Bench) -> None:
    """A request with prompts comes to the engine once they are encoded: then its client hears of it by its answer."""
    client = bench.ask()
    (job,) = bench.engine.jobs
    command = "policy robust needs a calibration. Make one with: adacorr-calibrate /srv/secret.bundle --steps 9"
    job.fail(CalibrationError(command))
    status, text = client.failure
    assert status is Status.INVALID
    assert text.startswith("policy robust needs a calibration that this server doesn't hold for ddim")
    assert "/srv" not in text
    assert [line["message"] for line in bench.log] == [command]


def test_prompts_are_encoded_beside_the_servers_thread_and_then_sampled(book: OrderBook) -> None:
    bench, release, texts = Bench(book), threading.Event(), Texts(prompts=("a dog",))

    def encode(
        prompts: Sequence[str], negative: Sequence[str] = (), *, cancelled: Callable[[], bool] | None = None
    ) -> Prompts:
        assert release.wait(SECONDS)
        return Prompts(embeddings=np.ones((1, 2, 3), np.float32), mask=np.ones((1, 2), np.int64))

    class WithTexts:
        """An order book whose orders have prompts."""

        def order(self, fields: Mapping[str, Field], *, wanted: Sequence[str] = ()) -> Order:
            return replace(book.order(fields, wanted=wanted), texts=texts)

    desk = PromptDesk(encode, max_queue=4, engine_depth=lambda: 0)
    bench.service = SamplingService(
        bench.engine,
        WithTexts(),  # type: ignore[arg-type]
        bench.reports,
        prompts=desk,
    )
    with bench.service:
        first, second = bench.ask(), bench.ask()  # neither waits for the encoder
        wait_until(lambda: len(desk) == 1)
        assert bench.service.status()["queue_depth"] == 2  # the engine's, and one here
        second.gone = True
        assert second.failure[0] is Status.CANCELLED
        release.set()
        wait_until(lambda: bool(bench.engine.jobs))
        (job,) = bench.engine.jobs
        assert job.request.prompts is not None
        assert (job.request.prompts.embeddings == 1).all()
        job.finish()
        assert first.tensors["launches"] == [7]
    assert bench.outcomes() == {"done": 1, "cancelled": 1}


def test_a_full_queue_is_told_with_its_depth(bench: Bench) -> None:
    bench.engine.refusal = QueueFullError.at(64)
    status, message = bench.ask().failure
    assert status is Status.UNAVAILABLE
    assert "64" in message
    assert bench.outcomes() == {"rejected": 1}


@pytest.mark.parametrize(
    ("tensors", "parameters", "message"),
    [
        ({"class_labels": np.array([9])}, {}, "class_labels[0] is 9, allowed are whole numbers from 0 to 2."),
        ({"class_labels": np.array([1])}, {"polcy": "x"}, "'polcy' is no field of a request."),
        ({"command": text_tensor(["dance"])}, {}, "command is 'dance', allowed are sample, submit,"),
        ({"command": text_tensor(["next"])}, {}, "stream is None, which is none that is open"),
        ({"class_labels": np.array([1]), "stream": text_tensor(["x"])}, {}, "stream belongs to the commands next"),
    ],
)
def test_a_malformed_request_reaches_no_engine(
    bench: Bench, tensors: Tensors, parameters: dict[str, str | int | float | bool], message: str
) -> None:
    status, found = bench.ask(tensors, parameters=parameters).failure
    assert status is Status.INVALID
    assert found.startswith(message)
    assert not bench.engine.jobs
    assert bench.outcomes() == {"refused": 1}


def test_a_client_that_goes_away_ends_its_request(bench: Bench) -> None:
    client = bench.ask()
    (job,) = bench.engine.jobs
    client.gone = True
    assert job.cancelled.wait(5)
    assert client.failure[0] is Status.CANCELLED
    assert bench.outcomes() == {"cancelled": 1}


def test_a_client_that_was_answered_is_not_asked_whether_it_has_gone() -> None:
    client = Client()
    reply = GuardedReply(client)
    client.gone = True
    assert reply.is_cancelled()
    reply.fail(Status.CANCELLED, "Cancelled.")
    assert not reply.is_cancelled()  # the client itself would raise
    sent = GuardedReply(Client())
    sent.send({})
    assert not sent.is_cancelled()


def test_a_bug_is_an_answer_too(bench: Bench) -> None:
    client = Client()

    def broken() -> Tensors:
        raise ZeroDivisionError

    bench.service.handle(Incoming(request_id="r", tensors=broken, parameters={}, wanted=ALL), client)
    assert client.failure == (Status.INTERNAL, "An error inside the server: ZeroDivisionError. Its log tells more.")
    assert "ZeroDivisionError" in str(bench.log[0]["message"])


def test_nothing_is_handed_on_before_the_first_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adacorr_deploy.serving.service._FLUSH_SECONDS", 0.0)
    time.sleep(0.2)
    assert bench.sink.gauges == {}
    bench.ask(command("status"))
    wait_until(lambda: QUEUE_DEPTH.name in bench.sink.gauges)


def test_images_come_from_the_decoder_and_its_error_is_the_requests_own(book: OrderBook) -> None:
    def decoded(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        if latents.min() == 1:
            raise EngineError("The decoded images hold NaN.")
        return np.repeat(latents, 3, axis=1)

    bench = Bench(book)
    with SamplingService(bench.engine, book, bench.reports, images=decoded) as service:
        clients = [Client(), Client()]
        for seed, client in enumerate(clients):
            tensors: Tensors = {"class_labels": np.array([1]), "seed": np.array([seed], dtype=np.uint64)}
            wanted = frozenset({"pixels", "latents"})
            incoming = Incoming(request_id="r", tensors=partial(dict, tensors), parameters={}, wanted=wanted)
            service.handle(incoming, client)
            bench.engine.jobs[seed].finish()
        assert clients[0].tensors["pixels"].shape == (1, 4, 4, 3)
        assert clients[0].tensors["latents"].shape == (1, 1, 4, 4)
        assert clients[1].failure == (Status.INTERNAL, "The decoded images hold NaN.")


def test_status_takes_no_place_in_the_queue(bench: Bench) -> None:
    bench.engine.refusal = QueueFullError.at(64)
    assert event(bench.ask(command("status"))) == {
        "type": "status",
        "queue_depth": 1,
        "active_requests": 2,
        "slot_bytes": 3,
        "streams": 0,
    }


# --- Streams -----------------------------------------------------------------------------------------------------


def opened(bench: Bench) -> str:
    client = bench.ask({"class_labels": np.array([1]), **command("submit")})
    return str(event(client)["stream"])


def test_a_stream_tells_progress_then_the_result(bench: Bench) -> None:
    name = opened(bench)
    (job,) = bench.engine.jobs
    waiting = bench.ask(command("next", name))
    assert not waiting.answered
    job.step(1)
    assert event(waiting) == {"type": "progress", "step": 1, "steps": 8, "rho": 0.5}
    job.step(2)
    job.step(3)  # a reader that is late skips
    assert job.on_preview is not None
    job.on_preview(3, np.zeros((1, 1, 4, 4), np.float32))
    late = bench.ask({**command("next", name), "after_step": np.array([1])})
    assert event(late)["step"] == 3
    assert late.tensors["png"][0].startswith(b"\x89PNG")
    job.finish()
    last = bench.ask({**command("next", name), "after_step": np.array([3])})
    assert event(last) == {"type": "result"}
    assert last.tensors["launches"] == [7]
    wait_until(lambda: bench.service.status()["streams"] == 0)
    assert bench.outcomes() == {"done": 1}


def test_a_waiting_reader_gets_a_sign_of_life(bench: Bench) -> None:
    assert event(bench.ask(command("next", opened(bench))))["step"] == 0


def test_a_stream_can_be_cancelled(bench: Bench) -> None:
    name = opened(bench)
    reader = bench.ask({**command("next", name), "after_step": np.array([-1])})
    assert event(reader)["step"] == 0
    reader = bench.ask(command("next", name))
    assert event(bench.ask(command("cancel", name))) == {"type": "cancelled"}
    assert reader.failure[0] is Status.CANCELLED
    assert bench.ask(command("next", name)).failure[0] is Status.INVALID
    assert bench.service.status()["streams"] == 0


def test_a_stream_that_nobody_reads_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adacorr_deploy.serving.streams.LEASE_SECONDS", 0.1)
    opened(bench)
    (job,) = bench.engine.jobs
    assert job.cancelled.wait(5)
    wait_until(lambda: bench.service.status()["streams"] == 0)


def test_two_readers_of_one_stream_are_told_apart(bench: Bench) -> None:
    name = opened(bench)
    bench.ask(command("next", name))
    status, message = bench.ask(command("next", name)).failure
    assert status is Status.INVALID
    assert "is being read by another request" in message
