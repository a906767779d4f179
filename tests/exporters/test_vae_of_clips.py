"""Clips are decoded as diffusers' video pipelines do: in the same chunks of frames, by VAEs that mix them or don't."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, LattePipeline
from numpy.typing import NDArray

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.exporters.vae import load_vae
from tests.exporters.random_vae import random_temporal_vae, random_vae, write_vae
from tests.exporters.test_vae import decoded, normal, relative_error
from tests.models import model_spec

Array = NDArray[np.float32]


def video_model(frames: int, height: int = 4, width: int = 6, precision: DType = DType.FLOAT32) -> ModelSpec:
    return model_spec(latent_shape=(4, frames, height, width), patch=(1, 1, 1), precision=precision)


def in_diffusers(vae: AutoencoderKL | AutoencoderKLTemporalDecoder, latents: Array, chunk: int = 14) -> Array:
    """Decode each clip by itself with the pipeline's own method; (B, F, 3, H, W)."""
    pipeline = SimpleNamespace(vae=vae)
    with torch.inference_mode():
        clips = [
            LattePipeline.decode_latents(pipeline, torch.from_numpy(clip[None]), latents.shape[2], chunk)
            for clip in latents
        ]
    return torch.cat(clips).clamp(-1, 1).swapaxes(1, 2).numpy()


@pytest.fixture(scope="module")
def temporal(tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderKLTemporalDecoder, Path]:
    vae = random_temporal_vae(scaling_factor=0.5)
    return vae, write_vae(tmp_path_factory.mktemp("temporal") / "vae", vae)


@pytest.mark.parametrize("chunk", [None, pytest.param(5, marks=pytest.mark.slow), 1])
def test_frames_that_are_mixed_have_the_neighbours_that_they_have_in_diffusers(
    temporal: tuple[AutoencoderKLTemporalDecoder, Path], chunk: int | None, tmp_path: Path
) -> None:
    """16 frames make chunks of 14 and 2, as there; fewer at a time give other pixels, and the same as there."""
    vae, folder = temporal
    loaded, model = load_vae(folder), video_model(16)
    decoder = loaded.spec(model, chunk=chunk)
    assert decoder.frames == (chunk or 14)
    latents = normal(2, *model.latent_shape)
    expected = in_diffusers(vae, latents, chunk or 14)
    assert 0.1 < np.abs(expected).mean() < 0.99
    found = decoded(loaded, model, decoder, tmp_path, latents)
    assert found.shape == (2, 16, 3, 8, 12)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(expected, in_diffusers(vae, latents, 16)) > 1e-2  # the chunks matter


def test_frames_that_are_images_are_decoded_one_by_one(tmp_path: Path) -> None:
    vae = random_vae()
    loaded, model = load_vae(write_vae(tmp_path / "vae", vae)), video_model(3)
    decoder = loaded.spec(model)
    assert decoder.frames == 1
    latents = normal(2, *model.latent_shape)
    found = decoded(loaded, model, decoder, tmp_path, latents)
    assert relative_error(found, in_diffusers(vae, latents)) < 1e-4


def test_tiles_of_chunks_are_diffusers_decodings_blended(
    temporal: tuple[AutoencoderKLTemporalDecoder, Path], tmp_path: Path
) -> None:
    """By hand: two tiles of 8 of 12 rows, decoded in chunks of 2 of 3 frames, hand over where they overlap."""
    vae, folder = temporal
    loaded, model = load_vae(folder), video_model(3, height=12, width=8)
    decoder = loaded.spec(model, tile=8, chunk=2)
    latents = normal(1, *model.latent_shape)
    rows = np.arange(16)
    ramp = np.minimum(1, (np.minimum(rows, rows[::-1]) + 1) / 5)[:, None]
    total, weights = np.zeros((3, 3, 24, 16)), np.zeros((24, 1))
    for top in (0, 4):
        pixels = in_diffusers(vae, latents[..., top : top + 8, :], 2)[0]
        assert np.abs(pixels).max() < 1  # or clipping comes before blending
        total[..., 2 * top : 2 * top + 16, :] += ramp * pixels
        weights[2 * top : 2 * top + 16] += ramp
    found = decoded(loaded, model, decoder, tmp_path, latents)
    assert relative_error(found, (total / weights)[None].astype(np.float32)) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)  # three named axes take a while to trace
def test_clips_of_any_size_and_length_are_decoded_as_in_diffusers(
    temporal: tuple[AutoencoderKLTemporalDecoder, Path], tmp_path: Path
) -> None:
    vae, folder = temporal
    loaded, fixed = load_vae(folder), video_model(3)
    model = replace(fixed, latents=replace(fixed.latents, largest=(16, 8, 8)))
    decoder = loaded.spec(model, chunk=4)
    for size in ((3, 4, 6), (1, 8, 3), (9, 2, 8)):
        latents = normal(1, 4, *size)
        found = decoded(loaded, model, decoder, tmp_path, latents)
        assert relative_error(found, in_diffusers(vae, latents, 4)) < 1e-4


def test_in_half_precision_it_is_near_enough_and_stays_in_float32_where_it_overflows(tmp_path: Path) -> None:
    vae = random_temporal_vae(scaling_factor=0.5, force_upcast=False)
    loaded, model = load_vae(write_vae(tmp_path / "half", vae)), video_model(3, precision=DType.FLOAT16)
    decoder = loaded.spec(model)
    assert decoder.precision is DType.FLOAT16
    latents = normal(1, *model.latent_shape)
    error = relative_error(decoded(loaded, model, decoder, tmp_path, latents), in_diffusers(vae, latents))
    assert 1e-5 < error < 1e-2
    upcast = load_vae(write_vae(tmp_path / "upcast", random_temporal_vae(force_upcast=True)))
    assert upcast.spec(model).precision is DType.FLOAT32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [32, 48]}, "norm_num_groups 32 doesn't divide block_out_channels 48"),
        ({"block_out_channels": [32]}, "have .* entries, allowed is one number for all"),
        ({"norm_num_groups": 8}, "norm_num_groups: Input should be 32, got 8"),
        ({"layers_per_block": 0}, "layers_per_block.* --no-vae"),
    ],
)
def test_a_vae_without_a_compiled_form_is_refused(
    temporal: tuple[AutoencoderKLTemporalDecoder, Path], change: dict[str, object], message: str, tmp_path: Path
) -> None:
    config = json.loads((temporal[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_vae(tmp_path)
