"""Latte as parts: embed, condition, blocks and head, made of diffusers' own submodules.

Spatial and temporal blocks alternate, and each is a block of its own. A clip's frames share the tokens' axis, frame by
frame; what a block needs of that order it learns from the frames' positions.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.adaln_single import CONTEXT, AdaLNSingleCondition, context_specs
from adacorr_deploy.exporters.clip_attention import SpatialAttention, TemporalAttention
from adacorr_deploy.exporters.diffusers_modules import CrossAttention, PatchEmbedPart, SelfAttention, position_waves
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.units import Unit

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock

PROMPT_TOKENS: Final = 120  # T: what diffusers' pipeline pads prompts to
_FRAMES: Final = ("frame_positions",)


class TemporalPositions(nn.Module):
    """The frames' position waves, which don't depend on the tokens: a unit that adds a constant to them."""

    def forward(self, x: Tensor, frame_positions: Tensor) -> Tensor:
        """Return the positions (R, F·S, D), in the type of the tokens `x` (R, F·S, D), of frames (F,) float32."""
        waves = position_waves(frame_positions, x.shape[-1]).to(x.dtype)
        places: Tensor = torch.zeros_like(x).unflatten(1, (frame_positions.shape[0], -1))
        return (places + waves[:, None]).reshape(x.shape)


def blocks_of_latte(model: LatteTransformer3DModel) -> list[BasicTransformerBlock]:
    """Return a model's blocks in the order in which they run: spatial, temporal, spatial, …."""
    pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    return [block for pair in pairs for block in pair]


def spatial_units(block: BasicTransformerBlock) -> tuple[Unit, ...]:
    """Return a spatial block's attention, cross-attention and MLP; its table belongs to the condition part."""
    return (
        Unit("attention", block.norm1, SpatialAttention(SelfAttention(block.attn1)), _FRAMES),
        Unit("cross_attention", nn.Identity(), CrossAttention(block.attn2), CONTEXT),
        Unit("mlp", block.norm2, block.ff),
    )


def temporal_units(block: BasicTransformerBlock) -> tuple[Unit, ...]:
    """Return a temporal block's attention and MLP."""
    attention = TemporalAttention(SelfAttention(block.attn1))
    return Unit("temporal_attention", block.norm1, attention, _FRAMES), Unit("mlp", block.norm2, block.ff)


def modules_of_latte(model: LatteTransformer3DModel, precision: DType) -> FamilyModules:
    """Return what the parts of diffusers' model are made of."""
    of_model = blocks_of_latte(model)
    kinds = itertools.cycle((spatial_units, temporal_units))
    blocks = [units_of(block) for units_of, block in zip(kinds, of_model, strict=False)]
    width = model.temp_pos_embed.shape[-1]
    blocks[1] = (Unit("temporal_positions", nn.Identity(), TemporalPositions(), _FRAMES), *blocks[1])
    return FamilyModules(
        embed=PatchEmbedPart(model.pos_embed),
        condition=AdaLNSingleCondition(model, of_model, [[unit.name for unit in block] for block in blocks]),
        blocks=blocks,
        head=HeadPart(
            model.norm_out,
            model.proj_out,
            patch=(1, model.config.patch_size, model.config.patch_size),
            channels=model.config.in_channels,
        ),
        context=context_specs(tokens=PROMPT_TOKENS, width=width, precision=precision),
    )
