"""Whoever its neighbours are and whenever it comes, a request computes what it computes alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.decisions import Action, Observed, Placement, SpanCache
from adacorr_deploy.caching.policy import PRESETS, UNCALIBRATED, IntervalGate, Policy, policy_named
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import EngineError, PolicyError, RequestError
from adacorr_deploy.core.samplers import allowed_samplers
from adacorr_deploy.runtime import Pipeline, SampleRequest, controller_for_request, sample_with_policy
from adacorr_deploy.runtime.active_run import ActiveRun
from adacorr_deploy.runtime.batch_lane import Sweep
from adacorr_deploy.runtime.batch_ticket import Ending
from adacorr_deploy.runtime.batching import BatchingEngine
from tests.runtime.batching_world import Box, Job, Stage, submit
from tests.runtime.fake_backend import FakeBackend, FakeBuffer
from tests.runtime.spanned import divisions
from tests.runtime.tiny_dit import SCHEDULE, Array, Tensors, TinyDiT

JOBS = st.builds(
    Job,
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
    steps=st.integers(1, 5),
    guidance=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 3),
    sampler=st.sampled_from(allowed_samplers(SCHEDULE)),
    actions=st.lists(st.sampled_from(Action), min_size=1, max_size=12).map(tuple),
    whole_steps=st.booleans(),
    revision=st.sampled_from(Revision),
    spans=st.just(()) | divisions(),
    watched=st.sampled_from([Observed.INPUT, Observed.MODULATED, Observed.RESIDUAL]),
    measures=st.booleans(),
    history=st.integers(1, 3),
    arrives_at=st.integers(0, 12),
    cancelled_at=st.none() | st.integers(0, 12),
)


def kept_numbers(engine: BatchingEngine) -> list[Array]:
    """What the slots of idle workspaces hold."""
    spaces = [space for pool in engine._pools for _, space in pool._idle.values()]
    pools = [space.slots for space in spaces]
    slots = [slot for pool in pools for slot in (*pool._slots, *pool.spans, pool.output) if slot.history.capacity]
    buffers = [buffer for slot in slots for buffer in (slot.ring, *slot._allocated)]
    return [buffer.values.astype(np.float32) for buffer in buffers if isinstance(buffer, FakeBuffer)]


@given(
    jobs=st.lists(JOBS, min_size=1, max_size=6),
    buckets=st.sets(st.integers(1, 9), min_size=1, max_size=3),
    max_active_rows=st.integers(1, 12),
    lanes=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_request_computes_what_it_computes_alone(
    bundle: Path, model: TinyDiT, jobs: list[Job], buckets: set[int], max_active_rows: int, lanes: int
) -> None:
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        alone = [job.alone(pipeline) for job in jobs]
        with BatchingEngine(pipeline, buckets=sorted(buckets), max_active_rows=max_active_rows, lanes=lanes) as engine:
            stage = Stage(engine, jobs)
            outcomes = stage.play()
            stats = engine.stats()
            assert all(not values.any() for values in kept_numbers(engine))
    for number, (job, expected) in enumerate(zip(jobs, alone, strict=True)):
        outcome = outcomes[number]
        if outcome.result is None:
            assert outcome.ending is Ending.CANCELLED
            assert job.cancelled_at is not None
            continue
        np.testing.assert_array_equal(outcome.result.latents, expected.latents)
        assert json.loads(outcome.result.trace.to_json()) == json.loads(expected.trace.to_json())
        assert (outcome.result.rho, outcome.result.launches) == (expected.rho, expected.launches)
        assert stage.steps_seen[number] == [*range(1, job.steps + 1)]
    assert (stats.queue_depth, stats.active_requests, stats.active_rows, stats.slot_bytes) == (0, 0, 0, 0)
    assert sum(stats.finished.values()) == len(jobs)
    assert stats.rows_used <= stats.rows_launched


OUTPUT = Predictor(kind=PredictorKind.OUTPUT_TAYLOR)
POLICIES = (
    *(PRESETS[name] for name in UNCALIBRATED.split(", ") if not name.startswith("db")),  # those need more blocks
    Policy(name="output", gate=IntervalGate(interval=2), predictor=OUTPUT),
)


def kept_by(pipeline: Pipeline, policy: Policy) -> set[SpanCache]:
    controller = controller_for_request(pipeline, SampleRequest((0,), steps=6, guidance=3.0), policy)
    return {span.cache for span in controller.spans}


def test_policies_of_all_kinds_share_launches_and_agree_with_sampling_alone(
    pipeline: Pipeline, backend: FakeBackend
) -> None:
    assert {cache for policy in POLICIES for cache in kept_by(pipeline, policy)} == {*SpanCache}
    requests = [
        (SampleRequest((seed % 3,), steps=6 + seed % 3, guidance=3.0, seed=seed), policy)
        for seed, policy in enumerate(POLICIES)
    ]
    alone = [sample_with_policy(pipeline, request, policy) for request, policy in requests]
    backend.order.clear()
    with BatchingEngine(pipeline, buckets=(2, 4, 8, 16, 20)) as engine:
        boxes = [Box() for _ in requests]
        for (request, policy), box in zip(requests, boxes, strict=True):
            engine.submit(request, policy, on_done=box.put)
        results = [box.get().result for box in boxes]
        stats = engine.stats()
    for result, expected in zip(results, alone, strict=True):
        assert result is not None
        np.testing.assert_array_equal(result.latents, expected.latents)
        assert (result.rho, result.launches, result.steps) == (expected.rho, expected.launches, expected.steps)
    assert stats.block_evaluations == sum(expected.launches for expected in alone)
    assert stats.launches < stats.block_evaluations / 2
    assert stats.rows_used == 2 * stats.block_evaluations


def test_rows_that_reuse_a_block_do_not_pay_for_it(pipeline: Pipeline) -> None:
    reuses = Job(steps=6, actions=(Action.EVALUATE,) * 3 + (Action.REUSE,) * 15)
    with BatchingEngine(pipeline) as engine:
        Stage(engine, [reuses, Job(steps=6)]).play()
        stats = engine.stats()
    assert stats.rows_used == 2 * (3 + 18)
    assert stats.block_reuses == 15


def test_a_request_with_more_rows_than_any_launch_is_dealt_over_several(pipeline: Pipeline) -> None:
    job = Job(labels=(0, 1, 2, 0, 1), steps=3)
    alone = job.alone(pipeline)
    with BatchingEngine(pipeline, buckets=(3,), max_active_rows=4) as engine:
        outcomes = Stage(engine, [job, Job(seed=4)]).play()
        assert engine.stats().rows_launched % 3 == 0
    result = outcomes[0].result
    assert result is not None
    np.testing.assert_array_equal(result.latents, alone.latents)


def test_a_new_request_boards_while_another_runs(pipeline: Pipeline) -> None:
    with BatchingEngine(pipeline) as engine:
        Stage(engine, [Job(steps=8), Job(steps=2, arrives_at=3)]).play()
        stats = engine.stats()
    assert stats.launches == 8 * 3  # the second took none of its own
    assert stats.rows_used == 2 * (8 + 2) * 3


# --- Who is served when ------------------------------------------------------------------------------------------


class _Waiting(ActiveRun):
    def __init__(self, block: int) -> None:
        self.block = block


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_nobody_waits_longer_than_one_pass(blocks: list[int], data: st.DataObject) -> None:
    sweep, runs = Sweep(5), [_Waiting(block) for block in blocks]
    waited = dict.fromkeys(range(len(runs)), 0)
    for _ in range(15):
        block, served = sweep.next_stop(runs)
        assert served == [run for run in runs if run.block == block]  # all who wait there, the oldest first
        for number, run in enumerate(runs):
            waited[number] = 0 if run in served else waited[number] + 1
            if run in served:  # goes on to any block, perhaps to the same one
                run.block = data.draw(st.integers(0, 4))
        assert max(waited.values()) < 5


def test_who_always_comes_back_to_one_block_does_not_hold_the_others_up(pipeline: Pipeline) -> None:
    ended: list[str] = []
    hog = Job(steps=60, actions=(Action.EVALUATE,) * 3 + (Action.REUSE, Action.EVALUATE, Action.REUSE) * 59)
    with BatchingEngine(pipeline, buckets=(2,)) as engine:
        _, first = submit(engine, hog, on_step=lambda step, steps, rho: ended.append("hog"))
        _, second = submit(engine, Job(steps=2), on_step=lambda step, steps, rho: ended.append("short"))
        assert [box.get().ending for box in (first, second)] == [Ending.DONE] * 2
    assert ended.index("short") < 10
    assert len(ended) == 62


def test_requests_are_admitted_in_their_order_and_a_large_one_is_not_passed(pipeline: Pipeline) -> None:
    started: list[int] = []

    def note(number: int) -> object:
        return lambda step, steps, rho: started.append(number) if step == 1 else None

    jobs = [Job(steps=3), Job(labels=(0, 1, 2), steps=2), Job(steps=1)]
    with BatchingEngine(pipeline, max_active_rows=6) as engine:
        boxes = [submit(engine, job, on_step=note(number))[1] for number, job in enumerate(jobs)]  # type: ignore[arg-type]
        assert [box.get().ending for box in boxes] == [Ending.DONE] * 3
    assert started == [0, 1, 2]


def test_a_policy_that_decides_on_the_device_shares_no_launches(pipeline: Pipeline) -> None:
    policy = policy_named("paper-exact").model_copy(update={"decide": Placement.DEVICE})
    with BatchingEngine(pipeline) as engine, pytest.raises(PolicyError, match="decides on the device"):
        engine.submit(SampleRequest((0,), steps=2), policy, on_done=Box().put)


# --- Buckets -----------------------------------------------------------------------------------------------------


def test_buckets_in_which_rows_compute_otherwise_are_not_used(bundle: Path, model: TinyDiT) -> None:
    backend = FakeBackend.of(model)
    block = backend.functions["block_00"]

    def adds_otherwise(tensors: Tensors) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
        results = block(tensors)
        if len(tensors["tokens"]) >= 6:
            results["tokens_out"] = np.nextafter(results["tokens_out"].astype(np.float32), np.float32(9))
        return results

    backend.functions = {**backend.functions, "block_00": adds_otherwise}
    job = Job(labels=(0, 1), steps=2)
    with Pipeline.open(bundle, backend=backend) as pipeline:
        alone = job.alone(pipeline)
        with BatchingEngine(pipeline, buckets=(1, 2, 4, 8)) as engine:
            assert (engine.buckets.sizes, engine.buckets.identical) == ((1, 2, 4), True)
            outcomes = Stage(engine, [job, job, job]).play()
    for outcome in outcomes.values():
        assert outcome.result is not None
        np.testing.assert_array_equal(outcome.result.latents, alone.latents)


@pytest.mark.parametrize(("buckets", "message"), [((), "buckets is empty"), ((0,), "bucket is 0"), ((2.5,), "2.5")])
def test_buckets_out_of_range_are_refused(pipeline: Pipeline, buckets: tuple[int, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BatchingEngine(pipeline, buckets=buckets)
    assert Job().alone(pipeline).steps == 4  # and the pipeline is free again


def test_the_pipeline_is_the_engines_until_it_is_closed(pipeline: Pipeline) -> None:
    with BatchingEngine(pipeline), pytest.raises(EngineError, match="sampling another request"):
        Job().alone(pipeline)
    assert Job().alone(pipeline).steps == 4
