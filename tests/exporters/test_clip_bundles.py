"""Invariant: a bundle of a video model, built from its checkpoint, samples what the original samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters import load_checkpoint
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime import Pipeline, Prompts, SampleRequest, sample_with_policy
from tests.exporters.test_stdit import SIZE, random_stdit

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
