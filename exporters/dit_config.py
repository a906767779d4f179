"""The configuration of diffusers' `DiTTransformer2DModel`, validated before any module is built from it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed
from pydantic import Field

from adacorr_deploy.exporters.model_config import Activation, ModelConfig, Size


class DiTConfig(ModelConfig):
    """The fields that shape the model."""

    num_attention_heads: Annotated[int, Field(ge=1, le=256, strict=True)] = 16
    attention_head_dim: Annotated[int, Field(ge=1, le=1024, strict=True)] = 72
    in_channels: Annotated[int, Field(ge=1, le=1024, strict=True)] = 4
    out_channels: Size | None = None
    num_layers: Annotated[int, Field(ge=1, le=512, strict=True)] = 28
    attention_bias: bool = True
    sample_size: Annotated[int, Field(ge=1, le=4096, strict=True)] = 32
    patch_size: Annotated[int, Field(ge=1, le=64, strict=True)] = 2
    activation_fn: Activation = "gelu-approximate"
    num_embeds_ada_norm: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 1000
    upcast_attention: Literal[False] = False
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    def refusal(self) -> str | None:
        if self.sample_size % self.patch_size:
            return f"patch_size {self.patch_size} doesn't divide sample_size {self.sample_size}"
        if self.out_channels not in (None, self.in_channels, 2 * self.in_channels):
            return (
                f"out_channels {self.out_channels} is neither in_channels {self.in_channels} (noise) "
                f"nor twice that (noise and variance)"
            )
        if self.width % 4:
            return f"width {self.width} isn't a multiple of 4, as the position embedding needs"
        return None


def empty_dit(config: DiTConfig) -> DiTTransformer2DModel:
    """Return the model with its weights on the meta device and its position embedding, which is no weight, computed."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config.model_dump())
    side = config.sample_size
    positions = PatchEmbed(side, side, config.patch_size, in_channels=1, embed_dim=config.width).pos_embed
    model.pos_embed.register_buffer("pos_embed", positions, persistent=False)
    return model
