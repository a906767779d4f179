"""The configuration of diffusers' `DiTTransformer2DModel`, validated before any module is built from it."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from diffusers import DiTTransformer2DModel
from pydantic import Field

from adacorr_deploy.exporters.diffusers_modules import compute_positions
from adacorr_deploy.exporters.model_config import PatchTransformerConfig


class DiTConfig(PatchTransformerConfig):
    """The fields that shape the model, with diffusers' own defaults."""

    num_embeds_ada_norm: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 1000
    upcast_attention: Literal[False] = False
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_elementwise_affine: bool = False


def empty_dit(config: DiTConfig) -> DiTTransformer2DModel:
    """Return the model with its weights on the meta device and its position embedding, which is no weight, computed."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(**config.model_dump())
    compute_positions(model.pos_embed)
    return model
