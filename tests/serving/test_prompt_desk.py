"""Prompts are encoded beside everything else, and a request that waits for it is watched over as any other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from adacorr_deploy.core.errors import (
    AdaCorrError,
    ClosedError,
    DeadlineExceededError,
    EngineError,
    QueueFullError,
    SamplingCancelledError,
)
from adacorr_deploy.runtime import Prompts
from adacorr_deploy.serving.engine import Finished
from adacorr_deploy.serving.prompt_desk import OnDone, PromptDesk, Texts
from tests.serving.scripted_engine import SECONDS, ScriptedOutcome, wait_until


class Encoder:
    """Encodes when a test says so, asking before each text whether it is to go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked: list[str] = []
        self.error: Exception | None = None

    def __call__(
        self, prompts: Sequence[str], negative: Sequence[str] = (), *, cancelled: Callable[[], bool] | None = None
    ) -> Prompts:
        for text in (*prompts, *negative):
            if cancelled is not None and cancelled():
                raise SamplingCancelledError("Cancelled.")
            self.asked.append(text)
            assert self.go_on.wait(SECONDS)
        if self.error is not None:
            raise self.error
        return Prompts(embeddings=np.zeros((len(prompts), 2, 3), np.float32), mask=np.ones((len(prompts), 2), np.int64))


class EngineTicket:
    def __init__(self, on_done: OnDone) -> None:
        self.on_done = on_done
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Asked:
    """A request at the desk, and all that came of it."""

    given: list[EngineTicket] = field(default_factory=list)
    ended: list[Finished] = field(default_factory=list)
    refusal: AdaCorrError | None = None

    def hand_over(self, prompts: Prompts, on_done: OnDone) -> EngineTicket:
        if self.refusal is not None:
            raise self.refusal
        self.given.append(EngineTicket(on_done))
        return self.given[-1]

    def error(self) -> AdaCorrError | None:
        wait_until(lambda: bool(self.ended))
        (ended,) = self.ended
        return ended.error


class Bench:
    def __init__(self) -> None:
        self.encoder, self.engine_depth = Encoder(), 0
        self.desk = PromptDesk(self.encoder, max_queue=2, engine_depth=lambda: self.engine_depth)

    def ask(
        self, text: str, asked: Asked | None = None, *, deadline: float | None = None
    ) -> tuple[Asked, Callable[[], None]]:
        asked = asked or Asked()
        texts = Texts(prompts=(text,), negative=("nothing",))
        ticket = self.desk.submit(texts, asked.hand_over, deadline=deadline, on_done=asked.ended.append)
        return asked, ticket.cancel

    def is_encoding(self, text: str) -> None:
        wait_until(lambda: text in self.encoder.asked)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.encoder.go_on.set()
    made.desk.close()


def test_who_asks_does_not_wait_and_the_time_here_counts_as_queueing(bench: Bench) -> None:
    asked, _ = bench.ask("a dog")
    bench.is_encoding("a dog")
    assert not asked.given
    bench.encoder.go_on.set()
    wait_until(lambda: bool(asked.given))
    asked.given[0].on_done(ScriptedOutcome(error=EngineError("x")))
    (ended,) = asked.ended
    assert ended.queue_seconds > ScriptedOutcome().queue_seconds
    assert ended.seconds - ended.queue_seconds == pytest.approx(0.5)  # the engine's own


def test_what_waits_here_and_in_the_engine_fills_one_queue(bench: Bench) -> None:
    bench.ask("being encoded")
    bench.is_encoding("being encoded")
    bench.ask("waits")
    assert len(bench.desk) == 1
    bench.engine_depth = 1
    with pytest.raises(QueueFullError) as refused:
        bench.ask("one too many")
    assert refused.value.depth == 2
    assert bench.encoder.asked == ["being encoded"]


def test_a_cancelled_or_late_request_ends_while_another_is_encoded(bench: Bench) -> None:
    bench.ask("being encoded")
    bench.is_encoding("being encoded")
    cancelled, cancel = bench.ask("cancelled")
    late, _ = bench.ask("late", deadline=time.monotonic() - 1)
    cancel()
    bench.desk.end_waiting()
    assert isinstance(cancelled.error(), SamplingCancelledError)
    assert isinstance(late.error(), DeadlineExceededError)
    assert len(bench.desk) == 0
    assert not cancelled.given + late.given


def test_a_request_that_is_cancelled_while_its_prompts_are_encoded_goes_no_further(bench: Bench) -> None:
    asked, cancel = bench.ask("a dog")
    bench.is_encoding("a dog")
    cancel()
    bench.encoder.go_on.set()
    assert isinstance(asked.error(), SamplingCancelledError)
    assert bench.encoder.asked == ["a dog"]  # not the negative one any more
    assert not asked.given


def test_a_request_that_is_with_the_engine_is_cancelled_there(bench: Bench) -> None:
    bench.encoder.go_on.set()
    asked, cancel = bench.ask("a dog")
    wait_until(lambda: bool(asked.given))
    cancel()
    wait_until(lambda: asked.given[0].cancelled)


@pytest.mark.parametrize("error", [EngineError("NaN"), RuntimeError("a bug")])
def test_an_encoder_that_fails_fails_one_request(bench: Bench, error: Exception) -> None:
    bench.encoder.error = error
    bench.encoder.go_on.set()
    first, _ = bench.ask("a dog")
    assert str(error) in str(first.error())
    bench.encoder.error = None
    second, _ = bench.ask("a cat")
    wait_until(lambda: bool(second.given))


def test_what_the_engine_refuses_is_the_requests_own_end(bench: Bench) -> None:
    bench.encoder.go_on.set()
    refused, _ = bench.ask("a dog", Asked(refusal=QueueFullError.at(7)))
    assert isinstance(refused.error(), QueueFullError)


def test_a_closed_desk_ends_who_waits_and_takes_no_more() -> None:
    bench = Bench()
    being_encoded, _ = bench.ask("being encoded")
    bench.is_encoding("being encoded")
    waits, _ = bench.ask("waits")
    closing = threading.Thread(target=bench.desk.close)
    closing.start()
    assert isinstance(waits.error(), ClosedError)
    bench.encoder.go_on.set()
    closing.join(SECONDS)
    assert isinstance(being_encoded.error(), ClosedError)
    with pytest.raises(ClosedError):
        bench.ask("late")
