"""Invariant: a bundle of a video model, built from its checkpoint, samples what the original samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LattePipeline
from numpy.typing import NDArray
from safetensors.torch import save_file

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters import load_checkpoint
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime import Pipeline, Prompts, SampleRequest, sample_with_policy
from tests.exporters.random_latte import FRAMES, random_latte
from tests.exporters.random_stdit import SIZE, random_stdit

STEPS = 20
TOLERANCE = 1e-3  # of a whole run's latents, relative


def random_prompts(lengths: list[int], tokens: int, width: int, seed: int) -> Prompts:
    draw = np.random.default_rng(seed)
    mask = (np.arange(tokens) < np.array(lengths)[:, None]).astype(np.int64)
    return Prompts(embeddings=draw.standard_normal((len(lengths), tokens, width), np.float32), mask=mask)


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def latte_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `LattePipeline.save_pretrained` leaves it, without VAE and text encoder."""
    folder = tmp_path_factory.mktemp("latte")
    random_latte().save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    parts = {name: ["diffusers", name] for name in ("LatteTransformer3DModel", "DDIMScheduler")}
    index = {"_class_name": "LattePipeline", "transformer": parts["LatteTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": parts["DDIMScheduler"]}))
    return folder


@pytest.fixture(scope="module")
def latte_bundle(latte_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("latte") / "bundle"
    return build_bundle(load_checkpoint(latte_pipeline), output, OnnxRuntimeBackend(), BuildOptions())


@pytest.mark.parametrize("size", [None, (FRAMES, 4, 6)])
@pytest.mark.parametrize("lengths", [[120, 120], [9]])
def test_latte_samples_what_its_pipeline_samples(
    latte_bundle: Bundle, lengths: list[int], size: tuple[int, int, int] | None
) -> None:
    """With masks the pipeline, given one prompt, cuts both prompts to the length of the first."""
    prompts = random_prompts(lengths, 120, 24, seed=1)
    negative = random_prompts([3], 120, 24, seed=2)
    request = SampleRequest(
        prompts=replace(prompts, negative=negative), steps=STEPS, guidance=4.0, seed=3, sampler=Sampler.DDIM, size=size
    )
    shape = (len(lengths), 4, *(size or (FRAMES, 8, 8)))
    latents = np.random.default_rng(4).standard_normal(shape, np.float32)
    with Pipeline.open(latte_bundle.path) as pipeline:
        found = sample_with_policy(pipeline, replace(request, latents=latents), policy_named("none")).latents

    original = LattePipeline(None, None, None, random_latte(), DDIMScheduler(clip_sample=False))
    original.set_progress_bar_config(disable=True)
    kept = lengths[0]
    expected = original(
        negative_prompt=None,
        prompt_embeds=torch.from_numpy(prompts.embeddings[:, :kept]),
        negative_prompt_embeds=torch.from_numpy(negative.embeddings[:, :kept]).repeat(len(lengths), 1, 1),
        latents=torch.from_numpy(latents),
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        video_length=FRAMES,
        height=8 * shape[3],
        width=8 * shape[4],
        output_type="latent",
    ).frames
    assert relative_error(found, expected.numpy()) < TOLERANCE


@pytest.fixture(scope="module")
def stdit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("stdit")
    save_file(random_stdit().state_dict(), folder / "model.safetensors")
    loaded = load_checkpoint(folder / "model.safetensors")
    return build_bundle(loaded, folder / "bundle", OnnxRuntimeBackend(), BuildOptions())


@pytest.mark.parametrize(("frames", "height", "width"), [(3, 8, 8), (1, 6, 10), (6, 4, 4)])
def test_stdit_samples_what_open_soras_loop_samples(stdit_bundle: Bundle, frames: int, height: int, width: int) -> None:
    """Its loop, from its description: evenly spaced times, moved by the clip's size; z grows by velocity · Δt.

    Rows without condition have the checkpoint's own null prompt, as far as the prompt's mask goes.
    """
    prompts = random_prompts([4, 10], SIZE.prompt_tokens, SIZE.prompt_width, seed=1)
    latents = np.random.default_rng(4).standard_normal((2, 4, frames, height, width), np.float32)
    request = SampleRequest(
        prompts=prompts,
        steps=STEPS,
        guidance=4.0,
        sampler=Sampler.FLOW_EULER,
        latents=latents,
        size=(frames, height, width),
        frame_rate=24.0,
    )
    with Pipeline.open(stdit_bundle.path) as pipeline:
        found = sample_with_policy(pipeline, request, policy_named("none")).latents

    model, clip = random_stdit(), torch.from_numpy(latents)
    null = model.y_embedder.y_embedding.expand(2, -1, -1)
    embeddings = torch.cat([torch.from_numpy(prompts.embeddings), null])
    mask, rate = torch.from_numpy(prompts.mask).repeat(2, 1), torch.full((4,), 24.0)
    ratio = (8 * height * 8 * width / 512**2 * frames) ** 0.5
    shares = [1 - step / STEPS for step in range(STEPS)]
    times = [1000 * ratio * share / (1 + (ratio - 1) * share) for share in shares]
    for now, after in zip(times, [*times[1:], 0.0], strict=True):
        output = model(torch.cat([clip, clip]), torch.full((4,), now), embeddings, mask, rate)[:, :4]
        conditional, unconditional = output.chunk(2)
        clip = clip + (unconditional + 4.0 * (conditional - unconditional)) * (now - after) / 1000
    assert relative_error(found, clip.numpy()) < TOLERANCE


def test_half_precision_stays_close(latte_pipeline: Path, latte_bundle: Bundle, tmp_path: Path) -> None:
    options = BuildOptions(precision=DType.FLOAT16)
    halves = build_bundle(load_checkpoint(latte_pipeline), tmp_path / "bundle", OnnxRuntimeBackend(), options)
    request = SampleRequest(prompts=random_prompts([9], 120, 24, seed=1), steps=5, guidance=1.0)
    found = []
    for bundle in (latte_bundle, halves):
        with Pipeline.open(bundle.path) as pipeline:
            found.append(sample_with_policy(pipeline, request, policy_named("none")).latents)
    assert 0 < relative_error(found[1], found[0]) < 2e-2
