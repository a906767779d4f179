"""The decode part computes what diffusers' decoder does, and a VAE that it can't follow is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.specs import DecoderSpec, DType, ModelSpec
from adacorr_deploy.core.tiles import tile_starts
from adacorr_deploy.engines.backend import Artefact
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters.checkpoints import load_checkpoint
from adacorr_deploy.exporters.onnx_parts import export_part
from adacorr_deploy.exporters.vae import LoadedVae, load_vae
from adacorr_deploy.runtime.decoder import Decoder
from tests.exporters.random_vae import random_vae, write_vae
from tests.models import model_spec

Array = NDArray[np.float32]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def model_of(height: int, width: int, precision: DType = DType.FLOAT32, channels: int = 4) -> ModelSpec:
    return model_spec(latent_shape=(channels, height, width), patch=(1, 1), precision=precision)


def decoded(vae: LoadedVae, model: ModelSpec, decoder: DecoderSpec, folder: Path, latents: Array) -> Array:
    """Export the decoder, and decode with it as a pipeline does."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = export_part(vae.part(model, decoder), decoder.precision, folder)
    backend = OnnxRuntimeBackend(threads=1)
    session = backend.open(Artefact(path=folder / "decode.onnx"), spec)
    return Decoder(decoder, session, backend).images(latents)


def in_diffusers(vae: AutoencoderKL, latents: Array, *, tiled: bool = False) -> Array:
    """Decode as diffusers' pipelines do."""
    config = vae.config
    moved = torch.from_numpy(latents) / config.scaling_factor + (config.shift_factor or 0.0)
    with torch.inference_mode():
        pixels = vae.tiled_decode(moved).sample if tiled else vae.decode(moved).sample
    return np.asarray(pixels.clamp(-1, 1).numpy(), dtype=np.float32)


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CONFIGS = [
    {},
    pytest.param({"levels": 4, "scaling_factor": 0.13025}, marks=pytest.mark.slow),
    {"latent_channels": 16, "shift_factor": 0.0609, "scaling_factor": 1.5305, "use_post_quant_conv": False},
    pytest.param({"mid_block_add_attention": False}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_part_decodes_as_diffusers_does(config: dict[str, object], tmp_path: Path) -> None:
    vae = random_vae(**config)  # type: ignore[arg-type]
    loaded = load_vae(write_vae(tmp_path / "vae", vae))
    model = model_of(8, 12, channels=vae.config.latent_channels)
    decoder = loaded.spec(model)
    assert (decoder.tile, decoder.scale) == ((8, 12), 2 ** (len(vae.config.block_out_channels) - 1))
    latents = normal(2, *model.latent_shape)
    expected = in_diffusers(vae, latents)
    assert 0.1 < np.abs(expected).mean() < 0.99  # neither grey nor clipped everywhere
    assert relative_error(decoded(loaded, model, decoder, tmp_path, latents), expected) < 1e-4


def test_latents_of_any_size_up_to_a_tile_are_decoded_as_diffusers_does(tmp_path: Path) -> None:
    """One part for all of them: its graph takes sizes other than the one that it was traced with."""
    vae = random_vae()
    loaded, fixed = load_vae(write_vae(tmp_path / "vae", vae)), model_of(8, 8)
    model = replace(fixed, latents=replace(fixed.latents, smallest=(4, 6), largest=(16, 12)))
    decoder = loaded.spec(model)
    assert decoder.tile == (16, 12)
    for size in ((8, 8), (4, 6), (16, 12), (5, 12)):
        latents = normal(1, 4, *size)
        found = decoded(loaded, model, decoder, tmp_path, latents)
        assert relative_error(found, in_diffusers(vae, latents)) < 1e-4


def test_in_half_precision_it_is_near_enough(tmp_path: Path) -> None:
    vae = random_vae(force_upcast=False)
    loaded, model = load_vae(write_vae(tmp_path / "vae", vae)), model_of(8, 8, DType.FLOAT16)
    decoder = loaded.spec(model)
    assert decoder.precision is DType.FLOAT16
    latents = normal(1, 4, 8, 8)
    error = relative_error(decoded(loaded, model, decoder, tmp_path, latents), in_diffusers(vae, latents))
    assert 1e-5 < error < 1e-2  # it is half precision, and works


def test_a_vae_that_overflows_in_half_precision_stays_in_float32(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae", random_vae(force_upcast=True)))
    precisions = {
        model: vae.spec(model_of(8, 8, model)).precision for model in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
    }
    assert precisions == {
        DType.FLOAT32: DType.FLOAT32,
        DType.FLOAT16: DType.FLOAT32,
        DType.BFLOAT16: DType.BFLOAT16,
    }
    assert vae.spec(model_of(8, 8, DType.FLOAT16), precision=DType.FLOAT16).precision is DType.FLOAT16


def test_tiles_are_diffusers_decodings_blended(tmp_path: Path) -> None:
    """By hand: every tile decoded in diffusers, each pixel the mean of its tiles, weighed by their edges' distance."""
    vae = random_vae()
    loaded, model = load_vae(write_vae(tmp_path / "vae", vae)), model_of(20, 12)
    decoder = loaded.spec(model, tile=12)
    assert (decoder.tile, decoder.overlap) == ((12, 12), 3)
    latents = normal(1, 4, 20, 12)
    total, weights = np.zeros((3, 40, 24)), np.zeros((40, 24))
    ramp = np.minimum(1, np.minimum(np.arange(1, 25), np.arange(24, 0, -1)) / 7)
    for top in tile_starts(20, 12, 3):
        moved = torch.from_numpy(latents[:, :, top : top + 12]) / vae.config.scaling_factor
        with torch.inference_mode():
            pixels = vae.decode(moved).sample[0].numpy()
        total[:, 2 * top : 2 * top + 24] += ramp[:, None] * ramp * pixels
        weights[2 * top : 2 * top + 24] += ramp[:, None] * ramp
    expected = np.clip(total / weights, -1, 1)[None]
    assert relative_error(decoded(loaded, model, decoder, tmp_path, latents), expected.astype(np.float32)) < 1e-4


def test_tiles_are_no_further_from_the_whole_than_diffusers_own(tmp_path: Path) -> None:
    """Group norms and the attention see a tile alone: in diffusers too, where tiles are laid otherwise."""
    vae = random_vae(levels=4, seed=1)
    loaded, model = load_vae(write_vae(tmp_path / "vae", vae)), model_of(32, 32)
    latents = normal(1, 4, 32, 32, seed=3)
    whole = in_diffusers(vae, latents)
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 128
    theirs = relative_error(in_diffusers(vae, latents, tiled=True), whole)
    ours = relative_error(decoded(loaded, model, loaded.spec(model, tile=16), tmp_path, latents), whole)
    assert 0 < ours <= theirs < 0.5


def test_weights_under_their_names_of_before_2023_are_the_same(tmp_path: Path) -> None:
    """DiT's own pipelines hold such: `query` for `to_q`, and projections as 1 × 1 convolutions."""
    folder = write_vae(tmp_path / "vae")
    present = load_vae(folder)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, value in load_file(folder / WEIGHTS).items():
        renamed = name
        for new, before in names.items():
            renamed = renamed.replace(new, before) if ".attentions." in name else renamed
        old[renamed] = value[:, :, None, None].contiguous() if renamed != name and value.dim() == 2 else value
    assert old.keys() != load_file(folder / WEIGHTS).keys()
    save_file(old, folder / WEIGHTS)
    for name, value in load_vae(folder).module.state_dict().items():
        assert torch.equal(value, present.module.state_dict()[name]), name


def test_only_the_decoders_weights_are_needed(tmp_path: Path) -> None:
    folder = write_vae(tmp_path / "vae")
    state = {name: value for name, value in load_file(folder / WEIGHTS).items() if "encoder" not in name}
    save_file(state, folder / WEIGHTS)
    assert load_vae(folder).config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny', known are AutoencoderKL, .* --no-vae"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types"),
        ({"block_out_channels": [8]}, "have .* entries, allowed is one number for all"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups 4 doesn't divide block_out_channels 18"),
        ({"block_out_channels": [8, 10**9]}, "block_out_channels"),
        ({"latents_mean": [0.0, 0.0, 0.0, 0.0]}, "latents_mean"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
        ({"scaling_factor": "1"}, None),
        ({"layers_per_block": 10_000}, "layers_per_block"),
        ({"out_channels": 4}, "out_channels"),
    ],
)
def test_a_vae_without_a_compiled_form_is_refused(
    change: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    folder = write_vae(tmp_path / "vae")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    if message is None:
        assert load_vae(folder).config.scaling_factor == 1.0
        return
    with pytest.raises(UnsupportedModelError, match=message):
        load_vae(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_vae(tmp_path / "vae")
    state = load_file(folder / WEIGHTS)
    lacking = {name: value for name, value in state.items() if name != "decoder.conv_in.bias"}
    wrong = {**state, "decoder.conv_in.bias": state["decoder.conv_in.bias"].fill_(float("nan"))}
    for weights, message in ((lacking, "1 missing: decoder.conv_in.bias"), (wrong, "holds NaN")):
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            load_vae(folder)
    with pytest.raises(CheckpointError, match=r"holds no config.json. Give the folder of a VAE"):
        load_vae(tmp_path / "nowhere")


def test_a_pipeline_brings_its_own_and_an_option_another_or_none(pipeline: Path, tmp_path: Path) -> None:
    assert load_checkpoint(pipeline).vae is None
    write_vae(pipeline / "vae")
    other = write_vae(tmp_path / "other", random_vae(seed=5))
    own, given = load_checkpoint(pipeline).vae, load_checkpoint(pipeline, vae=other).vae
    assert own is not None
    assert given is not None
    assert own.sha256 != given.sha256
    assert load_checkpoint(pipeline, with_vae=False).vae is None
    assert load_checkpoint(pipeline, vae=other, with_vae=False).vae is None


def test_a_vae_of_other_latents_than_the_models_is_refused(tmp_path: Path) -> None:
    vae = load_vae(write_vae(tmp_path / "vae"))
    with pytest.raises(UnsupportedModelError, match=r"decodes latents of 4 channels, the model's have 16"):
        vae.spec(model_of(8, 8, channels=16))
