"""The configuration of diffusers' `LatteTransformer3DModel`, validated before any module is built from it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from diffusers import LatteTransformer3DModel
from diffusers.models.embeddings import PatchEmbed, get_1d_sincos_pos_embed_from_grid
from pydantic import Field

from adacorr_deploy.exporters.model_config import Activation, ModelConfig, Size


class LatteConfig(ModelConfig):
    """The fields that shape the model, with diffusers' own defaults."""

    num_attention_heads: Annotated[int, Field(ge=1, le=256, strict=True)] = 16
    attention_head_dim: Annotated[int, Field(ge=1, le=1024, strict=True)] = 88
    in_channels: Annotated[int, Field(ge=1, le=1024, strict=True)]
    out_channels: Size | None = None
    num_layers: Annotated[int, Field(ge=1, le=512, strict=True)] = 1
    cross_attention_dim: Size
    attention_bias: bool = False
    sample_size: Annotated[int, Field(ge=1, le=4096, strict=True)] = 64
    patch_size: Annotated[int, Field(ge=1, le=64, strict=True)]
    activation_fn: Activation = "geglu"
    num_embeds_ada_norm: Size | None = None
    norm_type: Literal["ada_norm_single"]
    norm_elementwise_affine: bool = True
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    caption_channels: Size
    video_length: Annotated[int, Field(ge=2, le=4096, strict=True)] = 16

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def refusal(self) -> str | None:
        """Return why these fields don't go together, or None."""
        if self.sample_size % self.patch_size:
            return f"patch_size {self.patch_size} doesn't divide sample_size {self.sample_size}"
        if self.out_channels not in (None, self.in_channels, 2 * self.in_channels):
            return (
                f"out_channels {self.out_channels} is neither in_channels {self.in_channels} (noise) "
                "nor twice that (noise and variance)"
            )
        if self.width % 4:
            return f"width {self.width} isn't a multiple of 4, as the position embedding needs"
        if self.cross_attention_dim != self.width:
            return f"cross_attention_dim {self.cross_attention_dim} isn't the width {self.width} of projected captions"
        return None


def empty_latte(config: LatteConfig) -> LatteTransformer3DModel:
    """Return the model with its weights on the meta device; positions are no weights and computed as diffusers does."""
    with torch.device("meta"):
        model = LatteTransformer3DModel(**config.model_dump())
    side = config.sample_size
    scale = max(side // 64, 1)
    positions = PatchEmbed(side, side, config.patch_size, 1, config.width, interpolation_scale=scale).pos_embed
    model.pos_embed.register_buffer("pos_embed", positions, persistent=False)
    frames = torch.arange(config.video_length).unsqueeze(1)
    temporal = get_1d_sincos_pos_embed_from_grid(config.width, frames, output_type="pt").float()[None]
    model.register_buffer("temp_pos_embed", temporal, persistent=False)
    return model
