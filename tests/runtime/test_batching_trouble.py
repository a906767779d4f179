"""What goes wrong for one request goes wrong for it alone, and every request gets exactly one outcome."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.core.errors import (
    ClosedError,
    DeadlineExceededError,
    EngineError,
    QueueFullError,
    RequestError,
    SamplingCancelledError,
)
from adacorr_deploy.runtime import Pipeline, SampleRequest, batch_ticket
from adacorr_deploy.runtime.batch_lane import Sweep
from adacorr_deploy.runtime.batch_ticket import Ending, Listeners, Outcome, Ticket
from adacorr_deploy.runtime.batching import BatchingEngine
from adacorr_deploy.runtime.planned_run import planned_run
from tests.runtime.batching_world import PATIENCE_SECONDS, Box, Job, submit
from tests.runtime.fake_backend import FakeBackend


@pytest.fixture
def engine(pipeline: Pipeline) -> Iterator[BatchingEngine]:
    with BatchingEngine(pipeline, buckets=(2, 4, 8), max_queue=3, max_active_rows=4) as opened:
        yield opened


class Gate:
    """Holds the engine's thread before a launch of a block until it is opened."""

    def __init__(self, backend: FakeBackend, part: str = "block_00") -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._part = part
        backend.before_launch = self._wait

    def _wait(self, part: str) -> None:
        if part == self._part:
            self.reached.set()
            assert self._open.wait(PATIENCE_SECONDS)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_SECONDS)

    def open(self) -> None:
        self._open.set()


def block_launches(backend: FakeBackend) -> int:
    return sum(part.startswith("block_") for part in backend.order)


def test_a_full_queue_refuses_with_its_depth_and_takes_requests_again_later(
    engine: BatchingEngine, backend: FakeBackend
) -> None:
    gate = Gate(backend)
    boxes = [submit(engine, Job(labels=(0, 1)))[1]]  # four rows: nobody else is admitted beside it
    gate.wait()
    boxes += [submit(engine, Job())[1] for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests are waiting") as caught:
        submit(engine, Job())
    assert caught.value.depth == engine.stats().queue_depth == 3
    with pytest.raises(QueueFullError):
        engine.submit(SampleRequest((0,), steps=2), policy_named("none"), on_done=Box().put)
    gate.open()
    assert [box.get().ending for box in boxes] == [Ending.DONE] * 4
    assert submit(engine, Job())[1].get().ending is Ending.DONE


def test_a_cancelled_request_is_in_no_further_launch(engine: BatchingEngine, backend: FakeBackend) -> None:
    gate = Gate(backend, "block_01")
    ticket, box = submit(engine, Job(steps=50))
    gate.wait()
    launched = block_launches(backend)
    ticket.cancel()
    gate.open()
    assert isinstance(box.get().error, SamplingCancelledError)
    assert block_launches(backend) == launched + 1  # the one that was under way
    assert engine.stats().slot_bytes == 0


def test_a_cancelled_request_stops_also_where_it_needs_no_launch(engine: BatchingEngine, backend: FakeBackend) -> None:
    tickets: list[Ticket] = []
    launched: list[int] = []

    def cancel(step: int, steps: int, rho: float) -> None:
        if step == 5:
            tickets[0].cancel()
        launched.append(step)

    gate = Gate(backend)
    reuses = Job(steps=40, actions=(Action.EVALUATE,) * 3 + (Action.REUSE,) * 117)
    ticket, box = submit(engine, reuses, on_step=cancel)
    tickets.append(ticket)
    gate.open()
    assert box.get().ending is Ending.CANCELLED
    assert launched == [1, 2, 3, 4, 5]


def test_who_is_cancelled_while_waiting_never_starts(engine: BatchingEngine, backend: FakeBackend) -> None:
    gate = Gate(backend)
    _, first = submit(engine, Job(labels=(0, 1)))
    gate.wait()
    ticket, box = submit(engine, Job())
    ticket.cancel()
    gate.open()
    outcome = box.get()
    assert outcome.ending is Ending.CANCELLED
    assert outcome.queue_seconds == outcome.seconds
    assert first.get().ending is Ending.DONE
    assert backend.order.count("condition") == 1


def test_a_deadline_is_kept_within_one_launch_running_or_waiting(
    engine: BatchingEngine, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = [0.0]
    monkeypatch.setattr(batch_ticket, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    deadline = time.monotonic() + 1000.0
    gate = Gate(backend, "block_01")
    _, running = submit(engine, Job(labels=(0, 1), steps=50), deadline=deadline)
    gate.wait()
    _, waiting = submit(engine, Job(), deadline=deadline)
    _, patient = submit(engine, Job(steps=2))
    launched = block_launches(backend)
    late[0] = 2000.0
    gate.open()
    for box, when in ((running, "while it ran"), (waiting, "while it waited")):
        outcome = box.get()
        assert isinstance(outcome.error, DeadlineExceededError)
        assert when in str(outcome.error)
    assert patient.get().ending is Ending.DONE
    assert block_launches(backend) == launched + 1 + 2 * 3
    assert engine.stats().finished == {
        Ending.DONE: 1,
        Ending.CANCELLED: 0,
        Ending.EXPIRED: 2,
        Ending.FAILED: 0,
        Ending.ABORTED: 0,
    }


def test_a_deadline_that_is_no_time_is_refused(engine: BatchingEngine) -> None:
    with pytest.raises(RequestError, match="deadline is nan"):
        submit(engine, Job(), deadline=float("nan"))


@pytest.mark.filterwarnings("ignore:.* encountered in")
def test_nan_fails_its_own_request_and_poisons_no_neighbour(engine: BatchingEngine, pipeline: Pipeline) -> None:
    huge = np.full((1, 1, 4, 4), 3e38, dtype=np.float32)
    poisoned = replace(Job().request, latents=huge)
    neighbour = Job(seed=5)  # of the same size
    poison = Box()
    run = planned_run(pipeline.manifest, poisoned, Job().script(), history=2)
    engine.submit_planned(run, Listeners(on_done=poison.put))
    box = submit(engine, neighbour)[1]
    failed, healthy = poison.get(), box.get()
    again = submit(engine, neighbour)[1].get()  # in the workspaces that the poisoned one left
    assert failed.ending is Ending.FAILED
    assert "NaN" in str(failed.error)
    engine.close()
    expected = neighbour.alone(pipeline).latents
    for outcome in (healthy, again):
        assert outcome.result is not None
        np.testing.assert_array_equal(outcome.result.latents, expected)


def test_a_failing_engine_fails_those_in_the_launch_and_the_next_are_served(
    engine: BatchingEngine, backend: FakeBackend
) -> None:
    gate = Gate(backend)
    reuses = Job(steps=6, actions=(Action.EVALUATE,) * 3 + (Action.EVALUATE, Action.REUSE, Action.EVALUATE) * 5)
    boxes = [submit(engine, reuses)[1], submit(engine, Job(steps=6))[1]]
    gate.wait()
    count = [0]

    def fail_the_second(part: str) -> None:
        count[0] += part == "block_01"
        if part == "block_01" and count[0] == 2:  # at the second step, which the first request does not evaluate
            raise EngineError("block_01: out of memory")

    backend.before_launch = fail_the_second
    gate.open()
    assert boxes[0].get().ending is Ending.DONE
    failed = boxes[1].get()
    assert failed.ending is Ending.FAILED
    assert "out of memory" in str(failed.error)
    backend.before_launch = lambda part: None
    assert submit(engine, Job())[1].get().ending is Ending.DONE
    assert engine.stats().slot_bytes == 0


@pytest.mark.parametrize("part", ["condition", "embed", "head"])
def test_a_request_whose_own_parts_fail_fails_alone(engine: BatchingEngine, backend: FakeBackend, part: str) -> None:
    count = [0]

    def fail_once(launched: str) -> None:
        count[0] += launched == part
        if launched == part and count[0] == 1:
            raise RuntimeError("the driver is gone")

    backend.before_launch = fail_once
    boxes = [submit(engine, Job())[1] for _ in range(2)]
    assert [box.get().ending for box in boxes] == [Ending.FAILED, Ending.DONE]
    assert "RuntimeError: the driver is gone" in str(boxes[0].get().error)


def test_a_listener_that_raises_harms_nobody_else(engine: BatchingEngine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(outcome: Outcome) -> None:
        raise ValueError("no such socket")

    def broken_step(step: int, steps: int, rho: float) -> None:
        raise ValueError("no such socket")

    _, failed = submit(engine, Job(), on_step=broken_step)
    run = planned_run(engine._pipeline.manifest, Job().request, Job().script(), history=2)
    with caplog.at_level(logging.ERROR):
        engine.submit_planned(run, Listeners(on_done=broken))
        assert submit(engine, Job(seed=2))[1].get().ending is Ending.DONE
    assert "no such socket" in str(failed.get().error)
    assert "on_done of a request raised" in caplog.text


def test_previews_come_every_few_steps(engine: BatchingEngine) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    box = Box()
    engine.submit(
        SampleRequest((0,), steps=7),
        policy_named("none"),
        on_done=box.put,
        preview_every=3,
        on_preview=lambda step, latents: seen.append((step, latents.shape)),
    )
    assert box.get().ending is Ending.DONE
    assert seen == [(3, (1, 1, 4, 4)), (6, (1, 1, 4, 4))]


# --- The end -----------------------------------------------------------------------------------------------------


def test_closing_finishes_what_was_taken(pipeline: Pipeline) -> None:
    engine = BatchingEngine(pipeline, max_active_rows=2)
    boxes = [submit(engine, Job(steps=5))[1] for _ in range(4)]
    engine.close()
    assert [box.get().ending for box in boxes] == [Ending.DONE] * 4
    with pytest.raises(ClosedError):
        submit(engine, Job())
    engine.close()


def test_closing_the_pipeline_closes_the_engine_that_holds_it(pipeline: Pipeline) -> None:
    engine = BatchingEngine(pipeline)
    _, box = submit(engine, Job(steps=5))
    pipeline.close()
    assert box.get().ending is Ending.DONE
    with pytest.raises(ClosedError):
        submit(engine, Job())
    with pytest.raises(EngineError, match="closed"):
        BatchingEngine(pipeline)


def test_a_lane_that_has_nothing_left_ends_nobody_in_another(pipeline: Pipeline, backend: FakeBackend) -> None:
    engine = BatchingEngine(pipeline, lanes=2)
    gate = Gate(backend)
    _, box = submit(engine, Job(steps=5))
    gate.wait()
    closing = threading.Thread(target=engine.close)
    closing.start()
    until = time.monotonic() + PATIENCE_SECONDS
    while all(thread.is_alive() for thread in engine._threads) and time.monotonic() < until:
        time.sleep(0.001)
    gate.open()
    closing.join(PATIENCE_SECONDS)
    assert box.get().ending is Ending.DONE


def test_a_listener_that_would_end_the_thread_leaves_nobody_waiting(engine: BatchingEngine) -> None:
    def leave(step: int, steps: int, rho: float) -> None:
        raise SystemExit(1)

    _, box = submit(engine, Job(), on_step=leave)
    assert "SystemExit" in str(box.get().error)
    engine._threads[0].join(PATIENCE_SECONDS)
    with pytest.raises(ClosedError):
        submit(engine, Job())


def test_a_listener_can_not_close_the_engine(pipeline: Pipeline) -> None:
    refusals: list[EngineError] = []
    engine = BatchingEngine(pipeline)

    def close(step: int, steps: int, rho: float) -> None:
        with pytest.raises(EngineError, match="another thread") as caught:
            engine.close()
        refusals.append(caught.value)

    assert submit(engine, Job(steps=2), on_step=close)[1].get().ending is Ending.DONE
    assert len(refusals) == 2
    engine.close()


def test_closing_at_once_ends_every_request_with_an_error(pipeline: Pipeline, backend: FakeBackend) -> None:
    gate = Gate(backend)
    backend.before_launch, hold = lambda part: None, backend.before_launch
    engine = BatchingEngine(pipeline, max_active_rows=2)
    backend.before_launch = hold
    boxes = [submit(engine, Job(steps=50))[1] for _ in range(3)]
    gate.wait()
    closing = threading.Thread(target=lambda: engine.close(drain_seconds=0.0))
    closing.start()
    while engine._desk._drain_until is None:
        time.sleep(0.001)
    gate.open()
    closing.join(PATIENCE_SECONDS)
    assert [box.get().ending for box in boxes] == [Ending.ABORTED] * 3
    assert engine.stats().slot_bytes == engine.stats().queue_depth == 0
    assert Job().alone(pipeline).steps == 4


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(
    engine: BatchingEngine, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Sweep, runs: object) -> object:
        raise AssertionError("a bug")

    gate = Gate(backend)
    boxes = [submit(engine, Job(labels=(0, 1)))[1]]
    gate.wait()
    boxes.append(submit(engine, Job())[1])
    monkeypatch.setattr(Sweep, "next_stop", broken)
    gate.open()
    for box in boxes:
        assert "a bug" in str(box.get().error)
    engine._threads[0].join(PATIENCE_SECONDS)
    with pytest.raises(ClosedError):
        submit(engine, Job())


def test_workspaces_are_used_again_and_memory_stays_flat(engine: BatchingEngine, backend: FakeBackend) -> None:
    for seed in range(4):
        submit(engine, Job(seed=seed))[1].get()
    allocated = len(backend.buffers)
    for seed in range(20):
        submit(engine, Job(seed=seed))[1].get()
    assert len(backend.buffers) == allocated


def test_idle_workspaces_are_kept_within_their_limit(pipeline: Pipeline) -> None:
    with BatchingEngine(pipeline, idle_bytes=30_000) as engine:
        for steps in range(1, 12):
            submit(engine, Job(steps=steps))[1].get()
            assert engine._pools[0]._idle_bytes <= 30_000
