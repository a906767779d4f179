"""Invariant: Latte's parts, in PyTorch, compute what diffusers' own model computes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import LatteTransformer3DModel

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.specs import HALVES, DType
from adacorr_deploy.exporters.latte_adapter import LatteAdapter, LatteModel
from tests.exporters.clips import Chain, latents_of, random_prompts, relative_error
from tests.exporters.random_latte import CONFIG, FRAMES, random_latte

TOLERANCE = 1e-4
prompts = partial(random_prompts, tokens=120, width=24)


@pytest.fixture(scope="module")
def latte() -> LatteTransformer3DModel:
    return random_latte()


@pytest.mark.parametrize("segment", [HALVES, 1, 2, 3])
@pytest.mark.parametrize(("batch", "branches"), [(1, 1), (2, 2)])
def test_the_chain_of_parts_equals_the_whole_model(
    segment: int, batch: int, branches: int, latte: LatteTransformer3DModel
) -> None:
    rows = batch * branches
    latents, conditions = latents_of(batch, FRAMES, 8, 8), prompts([7, 120, 1, 33][:rows])
    chain = Chain(LatteModel(latte), segment)
    timesteps = torch.tensor([999.0, 500.0, 3.0])
    output, variance = chain.model_output(latents, timesteps, 1, conditions, branches)
    expected = LatteModel(latte).predict(latents.repeat(branches, 1, 1, 1, 1), timesteps[1].expand(rows), conditions)
    assert relative_error(output, expected[:, :4]) < TOLERANCE
    assert relative_error(variance, expected[:batch, 4:]) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (6, 2)])
def test_frames_of_other_sizes_have_diffusers_positions(
    height: int, width: int, latte: LatteTransformer3DModel
) -> None:
    latents, conditions = latents_of(1, FRAMES, height, width), prompts([120])
    output, _ = Chain(LatteModel(latte), 1).model_output(latents, torch.tensor([500.0]), 0, conditions, 1)
    expected = latte(latents, torch.tensor([500.0]), conditions["prompt_embeddings"]).sample
    assert relative_error(output, expected[:, :4]) < TOLERANCE


@pytest.mark.parametrize("frames", [2, 3])
def test_a_shorter_clip_has_the_first_positions(frames: int) -> None:
    """Diffusers adds all of its positions or fails, so the model for comparison is one that has as many."""
    shorter = random_latte(video_length=frames)
    latents, conditions = latents_of(1, frames, 8, 8), prompts([120])
    chain = Chain(LatteModel(random_latte()), 1)
    output, _ = chain.model_output(latents, torch.tensor([500.0]), 0, conditions, 1)
    expected = shorter(latents, torch.tensor([500.0]), conditions["prompt_embeddings"]).sample
    assert relative_error(output, expected[:, :4]) < TOLERANCE


def test_a_masked_prompt_is_a_shorter_one(latte: LatteTransformer3DModel) -> None:
    """As diffusers' pipeline has it, which cuts the padding off where there is one prompt."""
    latents, conditions = latents_of(1, FRAMES, 8, 8), prompts([9])
    output, _ = Chain(LatteModel(latte), 1).model_output(latents, torch.tensor([500.0]), 0, conditions, 1)
    expected = latte(latents, torch.tensor([500.0]), conditions["prompt_embeddings"][:, :9]).sample
    assert relative_error(output, expected[:, :4]) < TOLERANCE


def test_without_its_temporal_parts_the_chain_is_the_model_without_temporal_attention(
    latte: LatteTransformer3DModel,
) -> None:
    """What the spatial blocks alone compute, which diffusers can be asked for."""
    latents, conditions = latents_of(1, FRAMES, 8, 8), prompts([120])
    chain = Chain(LatteModel(latte), 1, blocks=[0, 2])
    output, _ = chain.model_output(latents, torch.tensor([500.0]), 0, conditions, 1)
    embeddings = conditions["prompt_embeddings"]
    expected = latte(latents, torch.tensor([500.0]), embeddings, enable_temporal_attentions=False).sample
    assert relative_error(output, expected[:, :4]) < TOLERANCE
    assert relative_error(latte(latents, torch.tensor([500.0]), embeddings).sample, expected) > 0.1


def test_spatial_and_temporal_blocks_alternate(latte: LatteTransformer3DModel) -> None:
    spatial, temporal = ("attention", "cross_attention", "mlp"), ("temporal_attention", "mlp")
    spec = LatteModel(latte).spec(DType.FLOAT32, 1)
    assert spec.blocks == (spatial, ("temporal_positions", *temporal), spatial, temporal)
    assert spec.units == (3, 3, 3, 2)


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate"])
@pytest.mark.parametrize("affine", [True, False])
def test_other_configurations_are_followed(activation: str, affine: bool) -> None:
    model = random_latte(activation_fn=activation, norm_elementwise_affine=affine, attention_bias=False)
    latents, conditions = latents_of(1, FRAMES, 4, 4), prompts([120])
    output, _ = Chain(LatteModel(model), 1).model_output(latents, torch.tensor([20.0]), 0, conditions, 1)
    expected = model(latents, torch.tensor([20.0]), conditions["prompt_embeddings"]).sample
    assert relative_error(output, expected[:, :4]) < TOLERANCE


def test_a_checkpoint_loads_as_diffusers_loads_it(latte: LatteTransformer3DModel) -> None:
    model = LatteAdapter().from_config({**CONFIG, "_class_name": "ignored"}, latte.state_dict(), where="x")
    latents, conditions = latents_of(1, FRAMES, 8, 8), prompts([120])
    embeddings = conditions["prompt_embeddings"]
    torch.testing.assert_close(
        model.module(latents, torch.tensor([5.0]), embeddings).sample,
        latte(latents, torch.tensor([5.0]), embeddings).sample,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "ada_norm_zero"}, "norm_type: .*, got 'ada_norm_zero'"),
        ({"video_length": 1}, "video_length: .*, got 1"),
        ({"cross_attention_dim": 16}, "cross_attention_dim 16 isn't the width 32 of projected captions"),
        ({"caption_channels": None}, "caption_channels: .*, got None"),
        ({"sample_size": 9}, "patch_size 2 doesn't divide sample_size 9"),
        ({"out_channels": 6}, "out_channels 6 is neither in_channels 4"),
    ],
)
def test_a_configuration_without_a_compiled_form_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        LatteAdapter().from_config({**CONFIG, **changes}, {}, where="x")


def test_weights_of_another_model_are_refused(latte: LatteTransformer3DModel) -> None:
    state = latte.state_dict()
    del state["temporal_transformer_blocks.1.scale_shift_table"]
    with pytest.raises(CheckpointError, match=r"1 missing: temporal_transformer_blocks.1.scale_shift_table"):
        LatteAdapter().from_config(CONFIG, state, where="x")
