"""Invariants of every family: what the bundle computes is what its own module computes, however it is cut and reused.

A new family is one row in `instances.FAMILIES`; all of this then runs on it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.granularity import Granularity, Spans
from adacorr_deploy.caching.policy import PRESETS, IntervalGate, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.cli.new_bundle import next_steps
from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.engine_build import CompilerOptions, Profile, WeightLayout
from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.core.samplers import default_sampler
from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.quality.metrics import relative_l2
from adacorr_deploy.quality.reference import diffusers_latents, diffusers_noises, initial_latents, uncached_latents
from adacorr_deploy.quality.validate import ValidateOptions, validate_bundle
from adacorr_deploy.runtime import BatchingEngine, Outcome, Pipeline, SampleRequest, sample_with_policy
from adacorr_deploy.runtime.example_requests import example_prompts, example_request
from tests.cli.conftest import run_main, shown_command
from tests.cli.test_prompts import write_embeddings
from tests.families.conftest import FLOAT16, HALVES, SEGMENTS, WHOLE, Built, Loaded, Opened
from tests.families.instances import FAMILIES

STEPS = 20
SIZES = [(name, size) for name, family in FAMILIES.items() for size in family.sizes]

# One of each granularity; all reuse every other step.
REUSING = {
    "parts": PRESETS["fora"],
    "range": Policy(
        name="all but the first",
        gate=IntervalGate(interval=2),
        predictor=Predictor(kind=PredictorKind.RESIDUAL),
        spans=Spans(granularity=Granularity.RANGE, first=1),
    ),
    "step": Policy(
        name="whole steps", gate=IntervalGate(interval=2), predictor=Predictor(kind=PredictorKind.OUTPUT_TAYLOR)
    ),
}


def asked(
    pipeline: Pipeline, *, steps: int = STEPS, images: int = 2, size: LatentSize | None = None, seed: int = 3
) -> SampleRequest:
    model = pipeline.manifest.model
    labels = tuple(image % max(model.num_classes, 1) for image in range(images))
    request = SampleRequest(labels, steps=steps, guidance=3.0, seed=seed, size=size)
    request = replace(request, sampler=default_sampler(pipeline.manifest.schedule))
    return example_request(model, request, range(seed, seed + images))


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_and_a_whole_trajectory_are_the_original_modules(name: str, built: Built, family: Loaded) -> None:
    """Parts within 1e-4, the runtime's own parts as their oracle, 20 steps within 1e-3 of diffusers' loop."""
    found = validate_bundle(built(name, WHOLE), family(name), ValidateOptions(steps=STEPS))
    assert found.failed_parts == ()
    assert found.trajectory.rel_l2 < 1e-3
    assert found.trajectory.engine_rel_l2 < 1e-3


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_a_trajectory_of_another_size_is_the_original_modules(
    name: str, size: LatentSize, opened: Opened, family: Loaded
) -> None:
    pipeline = opened(name, WHOLE)
    request = asked(pipeline, size=size)
    start = initial_latents(pipeline, request)
    expected = diffusers_latents(family(name), pipeline.manifest.schedule, request, start)
    assert expected.shape[2:] == size
    assert relative_l2(uncached_latents(pipeline, request, start, diffusers_noises(pipeline, request)), expected) < 1e-3


@pytest.mark.parametrize("options", [SEGMENTS, HALVES], ids=["segments", "halves"])
@pytest.mark.parametrize("name", FAMILIES)
def test_however_blocks_are_cut_the_latents_are_the_same(name: str, options: BuildOptions, opened: Opened) -> None:
    whole, cut = opened(name, WHOLE), opened(name, options)
    blocks = whole.manifest.model.blocks
    parts = sum(map(len, blocks)) if options is HALVES else -(-len(blocks) // options.segment)
    assert len(cut.manifest.model.units) == parts
    request = asked(whole)
    expected = sample_with_policy(whole, request, PRESETS["none"]).latents
    assert relative_l2(sample_with_policy(cut, request, PRESETS["none"]).latents, expected) < 1e-4


@pytest.mark.parametrize("granularity", REUSING)
@pytest.mark.parametrize("options", [WHOLE, SEGMENTS, HALVES], ids=["blocks", "segments", "halves"])
@pytest.mark.parametrize("name", FAMILIES)
def test_reuse_saves_launches_and_stays_near_the_uncached_latents(
    name: str, options: BuildOptions, granularity: str, opened: Opened
) -> None:
    """At every granularity; and of every size, in the same launches."""
    pipeline = opened(name, options)
    for size in (None, *FAMILIES[name].sizes):
        request = asked(pipeline, size=size)
        uncached = sample_with_policy(pipeline, request, PRESETS["none"])
        reused = sample_with_policy(pipeline, request, REUSING[granularity])
        assert reused.launches < uncached.launches
        assert 0.1 < reused.rho < 0.7
        assert 0 < relative_l2(reused.latents, uncached.latents) < 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_requests_of_any_size_run_together_and_give_what_they_give_alone(name: str, opened: Opened) -> None:
    pipeline = opened(name, WHOLE)
    policies = (PRESETS["none"], PRESETS["fora"])
    sizes = (None, *FAMILIES[name].sizes)
    jobs = [
        (asked(pipeline, steps=5 + index, images=1 + index % 2, size=sizes[index % len(sizes)], seed=index), policy)
        for index, policy in enumerate(policies * 2)
    ]
    with BatchingEngine(pipeline, buckets=(2, 4, 8)) as engine:
        assert engine.buckets.identical
        alone = [_latents(engine, [job])[0] for job in jobs]
        together = _latents(engine, jobs)
    for one, shared in zip(alone, together, strict=True):
        np.testing.assert_array_equal(shared, one)


def _latents(engine: BatchingEngine, jobs: list[tuple[SampleRequest, Policy]]) -> list[NDArray[np.float32]]:
    answers: list[SimpleQueue[Outcome]] = [SimpleQueue() for _ in jobs]
    for (request, policy), answer in zip(jobs, answers, strict=True):
        engine.submit(request, policy, on_done=answer.put)
    latents = []
    for outcome in [answer.get(timeout=300) for answer in answers]:
        assert outcome.result is not None, outcome.error
        latents.append(outcome.result.latents)
    return latents


@pytest.mark.parametrize("name", FAMILIES)
def test_in_half_precision_parts_are_within_its_tolerance(name: str, built: Built, family: Loaded) -> None:
    found = validate_bundle(built(name, FLOAT16), family(name), ValidateOptions(steps=6))
    assert found.failed_parts == ()
    assert np.isfinite(found.trajectory.rel_l2)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_build_shows_next_runs_as_it_stands(
    name: str, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, embeddings in place of prompts, clips and their frame rates; images, or latents where there are none."""
    bundle = open_bundle(built(name, WHOLE))
    if (prompt := bundle.manifest.model.conditions.prompt) is not None:
        prompts = example_prompts(prompt, range(2))
        write_embeddings(tmp_path / "FILE.safetensors", prompts, prompts.negative)
    monkeypatch.chdir(tmp_path)
    (line,) = next_steps(bundle, calibrated=False)
    assert run_main(*shown_command(line)) == 0, line
    assert (tmp_path / "latents.npy").is_file() or (tmp_path / "images" / "grid.png").is_file()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize(
    ("precision", "weights"), [(DType.FLOAT16, WeightLayout.INPUTS), (DType.BFLOAT16, WeightLayout.BAKED)]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_compiles_with_tensorrt_for_rtx(
    name: str, precision: DType, weights: WeightLayout, family: Loaded, tmp_path: Path
) -> None:
    from adacorr_deploy.engines.tensorrt_backend import TensorRTBackend
    from adacorr_deploy.engines.tensorrt_modules import TENSORRT_RTX

    loaded = family(name)
    latents = loaded.model.spec(precision, 1).latents
    sizes = {
        axis: (low, size, min(high, 2 * size))
        for (axis, low, high), size in zip(latents.ranges, latents.shape[1:], strict=True)
        if axis in latents.varying
    }
    profile = Profile(batch=(1, 2, 4), steps=(1, 20, 50), sizes=sizes)
    options = CompilerOptions(profile=profile, targets=("sm_89",), weights=weights)
    build_options = replace(FLOAT16, precision=precision)
    bundle = build_bundle(loaded, tmp_path / "bundle", TensorRTBackend(TENSORRT_RTX, options), build_options)
    build = bundle.manifest.engine_build
    assert build is not None
    assert build.profile.sizes.keys() == ({*latents.varying, "tokens"} if latents.varying else set())
    assert all((bundle.path / part.artefact).stat().st_size for part in bundle.manifest.parts.values())
