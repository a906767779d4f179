"""The configuration of diffusers' `PixArtTransformer2DModel`, validated before any module is built from it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from diffusers import PixArtTransformer2DModel
from pydantic import Field

from adacorr_deploy.exporters.diffusers_modules import compute_positions
from adacorr_deploy.exporters.model_config import Epsilon, PatchTransformerConfig, Side, Size

_CONDITIONED_SIZE = 128  # diffusers gives models of this sample_size the image's size, unless the config says otherwise


class PixArtConfig(PatchTransformerConfig):
    """The fields that shape the model, and those of the older class `Transformer2DModel` that must stay at rest."""

    out_channels: Size | None = 8
    cross_attention_dim: Size = 1152
    sample_size: Side = 128
    num_embeds_ada_norm: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 1000
    upcast_attention: Literal[False] = False
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    norm_elementwise_affine: Literal[False] = False
    norm_eps: Epsilon = 1e-6
    interpolation_scale: Annotated[float, Field(gt=0, le=1024)] | None = None
    use_additional_conditions: bool | None = None
    caption_channels: Size | None = None
    attention_type: Literal["default"] = "default"
    only_cross_attention: Literal[False] = False
    double_self_attention: Literal[False] = False
    num_vector_embeds: None = None

    @property
    def sized(self) -> bool:
        """Whether the model is told the image's size and aspect ratio."""
        if self.use_additional_conditions is None:
            return self.sample_size == _CONDITIONED_SIZE
        return self.use_additional_conditions

    def refusal(self) -> str | None:
        if reason := super().refusal():
            return reason
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            return f"cross_attention_dim {self.cross_attention_dim} isn't the width {self.width} of projected captions"
        if self.sized and self.width % 3:
            return f"width {self.width} isn't a multiple of 3, as the embedding of the image's size needs"
        return None

    def diffusers_arguments(self) -> dict[str, object]:
        """Return the arguments of diffusers' class."""
        legacy = {"only_cross_attention", "double_self_attention", "num_vector_embeds"}
        return self.model_dump(exclude=legacy)


def empty_pixart(config: PixArtConfig) -> PixArtTransformer2DModel:
    """Return the model with its weights on the meta device; positions are no weights and computed as diffusers does."""
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**config.diffusers_arguments())
    compute_positions(model.pos_embed)
    return model
