"""The whole loop on a GPU's stream gives what it gives on the host, and waits only where it says.

Runs under the stand-in for NVIDIA's driver, in a process of its own (test_device_runs.py starts it).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.decisions import Action, Kept, Observation, Observed, Span, SpanCache
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.runtime import BatchingEngine, Pipeline, SampleRequest
from adacorr_deploy.runtime.self_test import self_test
from tests.runtime.batching_world import Job, Stage
from tests.runtime.device_engines import DeviceEngines
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.golden import golden_sample, store_golden
from tests.runtime.scripted import Script
from tests.runtime.spanned import AFFINE, PROBE, SpanScript
from tests.runtime.tiny_dit import TinyDiT

pytestmark = pytest.mark.skipif("STAND_IN_DRIVER" not in os.environ, reason="needs the stand-in driver")

REQUEST = SampleRequest((0, 2), steps=12, guidance=3.0, seed=7)
STEPS = 12


@pytest.fixture
def engines(model: TinyDiT, tmp_path: Path) -> Iterator[DeviceEngines]:
    backend = DeviceEngines(model, tmp_path)
    yield backend
    backend.close()


def script(
    *,
    whole_steps: bool = True,
    lags: bool = False,
    measures: bool = False,
    corrects: bool = False,
    revision: Revision = Revision.NONE,
) -> Script:
    """Evaluate three steps of four."""
    other = Action.CORRECT if corrects else Action.REUSE
    made = Script(
        choose=lambda step, block: other if step % 4 == 3 else Action.EVALUATE,
        wants_signals=measures,
        measures=measures,
        revision=revision,
    )
    made.whole_steps, made.lags = whole_steps, lags
    return made


def spans(observation: Observation, *, lags: bool = False) -> SpanScript:
    """The first block always, the others as one range: observed, compared, mapped and measured."""
    return SpanScript(
        choose=lambda step, span: Action.REUSE if step % 4 == 3 else Action.EVALUATE,
        division=(Span(first=0, stop=1, cache=SpanCache.NONE), Span(first=1, stop=3, cache=SpanCache.RESIDUAL)),
        watched={1: (observation,)},
        affines={1: AFFINE},
        wants_signals=True,
        measures=True,
        compares=not lags,
        lags=lags,
    )


@pytest.mark.parametrize(
    "made",
    [
        spans(Observation(what=Observed.RESIDUAL)),
        spans(Observation(what=Observed.MODULATED, kept=Kept.STEP)),
        spans(Observation(what=Observed.INPUT), lags=True),
        spans(PROBE),
        script(),
        script(measures=True),
        script(measures=True, lags=True),
        script(revision=Revision.QUADRATIC, measures=True),
        script(revision=Revision.LINEAR, lags=True),
        script(whole_steps=False, revision=Revision.LINEAR),
        script(whole_steps=False, measures=True),
        script(whole_steps=False, corrects=True),
    ],
    ids=[
        "residual",
        "modulated",
        "range lagging",
        "probe",
        "whole steps",
        "measured",
        "lagging",
        "revised",
        "revised and lagging",
        "blocks revised",
        "by block",
        "corrected",
    ],
)
def test_a_gpus_stream_computes_what_the_host_does(
    bundle: Path, model: TinyDiT, engines: DeviceEngines, made: Script
) -> None:
    with Pipeline.open(bundle, backend=FakeBackend.of(model)) as pipeline:
        expected = pipeline.sample(REQUEST, made, history=1)
        signals = dict(made.signals)
    made.signals.clear()
    with Pipeline.open(bundle, backend=engines) as pipeline:
        for _ in range(2):  # the second time over captured graphs and used slots
            result = pipeline.sample(REQUEST, made, history=1)
            np.testing.assert_allclose(result.latents, expected.latents, rtol=1e-4, atol=1e-4)
            assert result.launches == expected.launches
    assert made.signals.keys() == signals.keys()
    for key, measured in made.signals.items():
        for branch, other in zip(measured, signals[key], strict=True):
            assert branch.relative_offset == pytest.approx(other.relative_offset, rel=1e-3, abs=1e-6)
            assert branch.probe == (None if other.probe is None else pytest.approx(other.probe, rel=1e-3, abs=1e-4))


@pytest.mark.parametrize("measures", [False, True])
@pytest.mark.parametrize("lags", [False, True])
def test_a_request_waits_for_the_whole_gpu_once(
    bundle: Path, engines: DeviceEngines, measures: bool, lags: bool
) -> None:
    with Pipeline.open(bundle, backend=engines) as pipeline:
        pipeline.sample(REQUEST, script(measures=measures, lags=lags), history=1)
        before, waits = engines.device.synchronisations, engines.device.event_waits
        pipeline.sample(REQUEST, script(measures=measures, lags=lags), history=1)
        assert engines.device.synchronisations - before == 1
        assert (engines.device.event_waits - waits > 0) == measures


def test_all_blocks_of_a_step_become_one_graph(bundle: Path, engines: DeviceEngines) -> None:
    made = script()
    made.references = False
    with Pipeline.open(bundle, backend=engines) as pipeline:
        pipeline.sample(REQUEST, made, history=1)
        before = engines.device.graph_launches
        result = pipeline.sample(REQUEST, made, history=1)
        evaluated = result.launches // 3  # steps; the tiny DiT has three blocks
        # A graph for the condition part, then embed at each step, and the blocks and the head where it is evaluated.
        assert engines.device.graph_launches - before == 1 + STEPS + 2 * evaluated


def test_the_self_test_runs_the_graphs_of_parts_and_of_whole_steps(
    bundle: Path, model: TinyDiT, engines: DeviceEngines, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "own"))
    store_golden(own, golden_sample(bundle, FakeBackend.of(model)))
    with Pipeline.open(own, backend=engines) as pipeline:
        result = self_test(pipeline)
        assert result.hardware == f"GPU 0 (stand-in), {engines.device.compute_capability}"
        fused = [launch for space in pipeline._workspaces.values() for launch in space.bound._fused.values()]
        assert [launch.captured for launch in fused if isinstance(launch, DeviceLaunch)] == [True]


def test_requests_that_share_launches_on_a_gpus_stream_compute_what_they_do_alone(
    bundle: Path, engines: DeviceEngines
) -> None:
    jobs = [
        Job(steps=6, seed=1, whole_steps=True, actions=(Action.EVALUATE,) * 4 + (Action.REUSE,) * 3),
        Job(steps=5, seed=2, labels=(0, 2), measures=True, actions=(Action.EVALUATE, Action.REUSE)),
        Job(steps=4, seed=3, guidance=1.0, actions=(Action.EVALUATE, Action.CORRECT, Action.EVALUATE), arrives_at=2),
    ]
    with Pipeline.open(bundle, backend=engines) as pipeline:
        alone = [job.alone(pipeline).latents for job in jobs]
        with BatchingEngine(pipeline, buckets=(2, 4, 8)) as engine:
            outcomes = Stage(engine, jobs).play()
            assert engine.stats().launches < engine.stats().block_evaluations
    for number, latents in enumerate(alone):
        result = outcomes[number].result
        assert result is not None, outcomes[number].error
        np.testing.assert_array_equal(result.latents, latents)
