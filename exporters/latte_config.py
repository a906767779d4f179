"""The configuration of diffusers' `LatteTransformer3DModel`, validated before any module is built from it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid
from pydantic import Field

from adacorr_deploy.exporters.diffusers_modules import compute_positions
from adacorr_deploy.exporters.model_config import Activation, Count, Layers, Patch, PatchTransformerConfig, Side, Size


class LatteConfig(PatchTransformerConfig):
    """The fields that shape the model, with diffusers' own defaults."""

    attention_head_dim: Count = 88
    in_channels: Count
    num_layers: Layers = 1
    cross_attention_dim: Size
    attention_bias: bool = False
    sample_size: Side = 64
    patch_size: Patch
    activation_fn: Activation = "geglu"
    num_embeds_ada_norm: Size | None = None
    norm_type: Literal["ada_norm_single"]
    norm_elementwise_affine: bool = True
    caption_channels: Size
    video_length: Annotated[int, Field(ge=2, le=4096, strict=True)] = 16

    def refusal(self) -> str | None:
        if reason := super().refusal():
            return reason
        if self.cross_attention_dim != self.width:
            return f"cross_attention_dim {self.cross_attention_dim} isn't the width {self.width} of projected captions"
        return None


def empty_latte(config: LatteConfig) -> LatteTransformer3DModel:
    """Return the model with its weights on the meta device; positions are no weights and computed as diffusers does."""
    with torch.device("meta"):
        model = LatteTransformer3DModel(**config.model_dump())
    compute_positions(model.pos_embed)
    frames = torch.arange(config.video_length).unsqueeze(1)
    temporal = get_1d_sincos_pos_embed_from_grid(config.width, frames, output_type="pt").float()[None]
    model.register_buffer("temp_pos_embed", temporal, persistent=False)
    return model
