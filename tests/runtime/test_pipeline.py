"""A pipeline gives the same images whatever happened in it before, and whoever else is in the batch."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.core.errors import BundleError, EngineError, PolicyError, RequestError, SamplingCancelledError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.plugins import oracle
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.slots import CacheSlot
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import Script
from tests.runtime.tiny_dit import Array, TinyDiT

REQUEST = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7, sampler=Sampler.DDPM)


def reusing() -> Script:
    return Script(choose=lambda step, block: Action.REUSE if step % 3 else Action.EVALUATE, coefficients=(2.0, -1.0))


def sampled(pipeline: Pipeline, request: SampleRequest = REQUEST) -> Array:
    return pipeline.sample(request, reusing(), history=2).latents


def test_same_seed_same_latents_and_other_seed_others(pipeline: Pipeline) -> None:
    first = sampled(pipeline)
    np.testing.assert_array_equal(first, sampled(pipeline))
    assert not np.allclose(first, sampled(pipeline, SampleRequest((0, 2), steps=6, guidance=3.0, seed=8)))


def test_an_image_does_not_depend_on_its_neighbours_nor_on_the_batch(pipeline: Pipeline) -> None:
    alone = sampled(pipeline, SampleRequest((2,), steps=6, guidance=3.0, seed=5, sampler=Sampler.DDPM))
    for neighbours in ((0,), (1, 1, 0)):
        request = SampleRequest((2, *neighbours), steps=6, guidance=3.0, seed=5, sampler=Sampler.DDPM)
        np.testing.assert_array_equal(sampled(pipeline, request)[:1], alone)


def test_given_latents_replace_the_drawn_ones_and_nothing_else(pipeline: Pipeline) -> None:
    drawn = [oracle.philox_normals(7, image, 0, 16).reshape(1, 4, 4) for image in range(2)]
    given = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7, sampler=Sampler.DDPM, latents=np.stack(drawn))
    np.testing.assert_array_equal(sampled(pipeline, given), sampled(pipeline))
    zeros = SampleRequest((0, 2), steps=6, guidance=3.0, seed=7, latents=np.zeros((2, 1, 4, 4), np.float32))
    assert not np.allclose(sampled(pipeline, zeros), sampled(pipeline))


def test_a_bundle_opens_by_the_text_of_its_path_too(pipeline: Pipeline, backend: FakeBackend) -> None:
    with Pipeline.open(str(pipeline.bundle.path), backend=backend) as opened:
        np.testing.assert_array_equal(sampled(opened), sampled(pipeline))


def test_nothing_of_one_request_reaches_the_next(pipeline: Pipeline, backend: FakeBackend) -> None:
    """Every buffer is poisoned between two requests, except for those that are constants by contract."""
    first = sampled(pipeline)
    space = next(iter(pipeline._workspaces.values()))
    blocks, image = space.blocks, space.image
    constants = (image.branches, blocks.zeros, blocks.thresholds, blocks.no_factors.gate_steps)
    kept = {buffer.address for buffer in (*constants, blocks.no_factors.coefficients)}
    kept |= {factor.address for pair in blocks.factors for factor in (pair.coefficients, pair.gate_steps)}
    kept.add(image.noise.address)  # multiplied by 0 before it is first drawn
    for buffer in backend.buffers:
        if buffer.address not in kept:
            buffer.values[...] = np.nan if buffer.values.dtype.kind == "f" else 0
    np.testing.assert_array_equal(sampled(pipeline), first)


def test_slots_are_empty_after_a_request_and_after_a_failed_one(pipeline: Pipeline) -> None:
    with pytest.raises(SamplingCancelledError):
        pipeline.sample(REQUEST, reusing(), history=2, cancelled=iter([False] * 8 + [True]).__next__)
    space = next(iter(pipeline._workspaces.values()))
    for slot in space.slots._slots:
        assert slot.history.steps == []
        assert not slot.ring.read().any()
        (reference,) = slot._allocated
        assert not reference.read().any()


def test_cancellation_takes_effect_between_two_blocks(pipeline: Pipeline, backend: FakeBackend) -> None:
    with pytest.raises(SamplingCancelledError, match="step 2 of 6"):
        pipeline.sample(REQUEST, Script(), history=1, cancelled=iter([False] * 4 + [True]).__next__)
    assert backend.order[-2:] == ["embed", "block_00"]  # the fifth question came before the second step's block 1


@pytest.mark.parametrize("part", ["condition", "embed", "block_01", "predict_1", "predict_2", "head"])
def test_an_interrupt_anywhere_leaves_the_pipeline_usable(bundle: Path, model: TinyDiT, part: str) -> None:
    backend = FakeBackend.of(model)
    with Pipeline.open(bundle, backend=backend) as pipeline:
        expected = sampled(pipeline)

        def interrupt(launched: str) -> None:
            if launched == part:
                raise KeyboardInterrupt

        backend.before_launch = interrupt
        with pytest.raises(KeyboardInterrupt):
            sampled(pipeline, SampleRequest((1, 1), steps=6, guidance=2.0, seed=1))
        backend.before_launch = lambda part: None
        np.testing.assert_array_equal(sampled(pipeline), expected)


def test_an_interrupt_while_factors_are_written_is_not_taken_for_written(
    pipeline: Pipeline, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampled(pipeline)
    space = next(iter(pipeline._workspaces.values()))
    gate_steps = space.blocks.factors[1].gate_steps
    write = type(gate_steps).write

    def interrupted(self: object, values: np.ndarray) -> None:
        if self is gate_steps:
            raise KeyboardInterrupt
        write(self, values)  # type: ignore[arg-type]

    other = Script(choose=lambda step, block: Action.REUSE if step > 1 else Action.EVALUATE, coefficients=(9.0, 9.0))
    monkeypatch.setattr(type(gate_steps), "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.sample(REQUEST, other, history=2)
    monkeypatch.setattr(type(gate_steps), "write", write)
    np.testing.assert_array_equal(sampled(pipeline), expected)


def test_buffers_and_bindings_outlive_requests(pipeline: Pipeline, backend: FakeBackend) -> None:
    sampled(pipeline)
    addresses, bindings = [buffer.address for buffer in backend.buffers], len(backend.bindings)
    sampled(pipeline, SampleRequest((1, 1), steps=6, guidance=2.0, seed=1))
    assert [buffer.address for buffer in backend.buffers] == addresses
    assert len(backend.bindings) == bindings


def test_at_most_two_run_sizes_stay_allocated(pipeline: Pipeline) -> None:
    first = sampled(pipeline)
    for steps in (2, 3, 4):
        sampled(pipeline, SampleRequest((0, 2), steps=steps))
    assert len(pipeline._workspaces) == 2
    np.testing.assert_array_equal(sampled(pipeline), first)


def test_without_a_cache_slots_share_one_ring(pipeline: Pipeline, backend: FakeBackend) -> None:
    pipeline.sample(REQUEST, Script(), history=0)
    space = next(iter(pipeline._workspaces.values()))
    first, segment, last = space.slots._slots
    assert first.ring is last.ring
    assert first.ring.address != segment.ring.address  # two transformer blocks in it: another shape


def test_a_second_request_at_the_same_time_is_refused(pipeline: Pipeline) -> None:
    refused: list[Exception] = []

    def second() -> None:
        try:
            sampled(pipeline)
        except EngineError as error:
            refused.append(error)

    def start_second(step: int, steps: int, rho: float) -> None:
        if step == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    result = pipeline.sample(REQUEST, reusing(), history=2, progress=start_second)
    assert "sampling another request" in str(refused[0])
    np.testing.assert_array_equal(result.latents, sampled(pipeline))


def test_two_leases_of_one_slot_are_refused(pipeline: Pipeline) -> None:
    sampled(pipeline)
    pool = next(iter(pipeline._workspaces.values())).slots
    with (
        pool.lease(references=lambda block: 0),
        pytest.raises(EngineError, match="belong to another request"),
        pool.lease(references=lambda block: 0),
    ):
        pass


def test_a_lease_clears_what_an_interrupted_return_left(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampled(pipeline)
    pool = next(iter(pipeline._workspaces.values())).slots

    def interrupted(self: CacheSlot) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pool.lease(references=lambda block: 1) as slots:  # noqa: PT012
        for slot in slots:
            slot.record(0)
        monkeypatch.setattr(CacheSlot, "clear", interrupted)
    monkeypatch.undo()
    with pool.lease(references=lambda block: 1) as slots:
        assert [(slot.history.steps, slot.next_entry) for slot in slots] == [([], 0)] * 3
    np.testing.assert_array_equal(sampled(pipeline), expected)


def test_a_closed_pipeline_says_so_and_closes_its_sessions(bundle: Path, model: TinyDiT) -> None:
    backend = FakeBackend.of(model)
    with Pipeline.open(bundle, backend=backend) as pipeline:
        pass
    assert all(session.closed for session in backend.sessions.values())
    with pytest.raises(EngineError, match="closed"):
        sampled(pipeline)


def test_a_part_that_does_not_open_closes_those_before_it(bundle: Path, model: TinyDiT) -> None:
    backend = FakeBackend.of(model)
    backend.functions = {name: part for name, part in backend.functions.items() if name != "head"}
    with pytest.raises(KeyError):
        Pipeline.open(bundle, backend=backend)
    assert backend.sessions
    assert all(session.closed for session in backend.sessions.values())


def test_a_bundle_without_a_needed_part_is_refused(bundle: Path, tmp_path: Path, backend: FakeBackend) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["parts"]["block_01"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="part block_01 is missing"):
        Pipeline.open(copy, backend=backend)


def test_a_bad_request_is_refused_before_anything_is_allocated(pipeline: Pipeline, backend: FakeBackend) -> None:
    with pytest.raises(RequestError, match="label is 9"):
        sampled(pipeline, SampleRequest((9,)))
    with pytest.raises(PolicyError, match="history is 4"):
        pipeline.sample(REQUEST, Script(), history=4)
    assert backend.buffers == []
