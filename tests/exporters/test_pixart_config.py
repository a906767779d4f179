"""Invariant: a PixArt configuration is taken as diffusers takes it, or refused with the value and what is allowed."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.exporters.pixart_config import PixArtConfig, empty_pixart

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "num_layers": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "ada_norm_zero"}, r"norm_type: .*'ada_norm_single'.*, got 'ada_norm_zero'"),
        ({"attention_type": "gated"}, r"attention_type: .*'default'.*, got 'gated'"),
        ({"upcast_attention": True}, r"upcast_attention: .*False.*, got True"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine: .*False.*, got True"),
        ({"cross_attention_dim": None}, "cross_attention_dim: .*integer.*, got None"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm: .*, got None"),
        ({"only_cross_attention": True}, "only_cross_attention: .*False.*, got True"),
        ({"double_self_attention": True}, "double_self_attention: .*False.*, got True"),
        ({"num_vector_embeds": 100}, "num_vector_embeds: .*None.*, got 100"),
        ({"interpolation_scale": 0}, "interpolation_scale: .*greater than 0.*, got 0"),
        ({"num_layers": 10**9}, "num_layers: .*less than or equal to 512.*, got 1000000000"),
        ({"activation_fn": "eval"}, "activation_fn: .*'gelu-approximate'.*, got 'eval'"),
        ({"sample_size": 9}, "patch_size 2 doesn't divide sample_size 9"),
        ({"out_channels": 12}, r"out_channels 12 is neither in_channels 4 \(noise\) nor twice that"),
        ({"attention_head_dim": 15}, "width 30 isn't a multiple of 4"),
        ({"caption_channels": 8, "cross_attention_dim": 32}, "cross_attention_dim 32 isn't the width 24 of projected"),
        ({"sample_size": 128, "attention_head_dim": 14, "cross_attention_dim": 28}, "width 28 isn't a multiple of 3"),
    ],
)
def test_what_has_no_compiled_form_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"config.json: {message}"):
        PixArtConfig.checked({**SMALL, **fields}, where="config.json")


@pytest.mark.parametrize("scale", [None, 1, 2.0])
@pytest.mark.parametrize("sample_size", [8, 64, 128])
def test_the_empty_model_has_diffusers_own_positions_and_weights(sample_size: int, scale: float | None) -> None:
    config = PixArtConfig.checked({**SMALL, "sample_size": sample_size, "interpolation_scale": scale}, where="")
    model, expected = empty_pixart(config), PixArtTransformer2DModel(**config.diffusers_arguments())
    assert torch.equal(model.pos_embed.pos_embed, expected.pos_embed.pos_embed)
    shapes = {name: weight.shape for name, weight in expected.state_dict().items()}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    assert all(weight.is_meta for weight in model.parameters())
    assert config.sized == expected.use_additional_conditions == (sample_size == 128)
