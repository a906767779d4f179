"""Latte as parts: embed, condition, blocks and head, made of diffusers' own submodules.

Spatial and temporal blocks alternate, and each is a block of its own. A clip's frames share the tokens' axis, frame by
frame; what a block needs of that order it learns from the frames' positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from diffusers import LatteTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.shapes import ROWS
from adacorr_deploy.core.specs import DType, TensorSpec
from adacorr_deploy.exporters.adaln_single import modulation_of_block
from adacorr_deploy.exporters.clip_attention import SpatialAttention, TemporalAttention, TemporalPositions
from adacorr_deploy.exporters.dit import SelfAttention
from adacorr_deploy.exporters.family_parts import FamilyModules, repeated
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.pixart import CrossAttention, PatchTokens
from adacorr_deploy.exporters.units import Unit

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock

PROMPT_TOKENS: Final = 120  # T: what diffusers' pipeline pads prompts to
MASKED: Final = -1e4  # added to the scores of a prompt's padding: far below any score, and a float16
_FRAMES: Final = ("frame_positions",)


class EmbedPart(nn.Module):
    """Latents to tokens, once, then repeated for every guidance branch."""

    def __init__(self, model: LatteTransformer3DModel) -> None:
        super().__init__()
        self.tokens = PatchTokens(model.pos_embed)

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (R, F·S, D) of `latents` (B, C, F, H, W) and `branches` (K,) of ones."""
        frames = self.tokens(latents.transpose(1, 2).flatten(0, 1))
        return (repeated(frames.reshape(latents.shape[0], -1, frames.shape[-1]), branches),)


class ConditionModule(nn.Module):
    """Timesteps and prompts to the modulation of every block and of the head, and to what cross-attention looks at."""

    def __init__(self, model: LatteTransformer3DModel, units: list[tuple[str, ...]]) -> None:
        super().__init__()
        self.embedder = model.adaln_single.emb
        self.linear = model.adaln_single.linear
        self.tables = nn.ParameterList([block.scale_shift_table for block in blocks_of_latte(model)])
        self.units = units
        self.head_table = model.scale_shift_table
        self.projection = model.caption_projection

    def forward(self, timesteps: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        """Return (S, R, 3U, D) per block, (S, R, 2, D) for the head, the context (R, T, D) and its bias (R, T).

        Args:
            timesteps: (S,) float32, in training steps.
            prompt_embeddings: (R, T, E) float32.
            prompt_mask: (R, T) int64, 1 where a prompt's token is real.
        """
        dtype, rows = self.linear.weight.dtype, prompt_embeddings.shape[0]
        # The sinusoid stays float32: at timestep 999 a float16 phase would be off by half a radian.
        waves = self.embedder.time_proj(timesteps.float()).to(dtype)
        condition = self.embedder.timestep_embedder(waves)[:, None].expand(-1, rows, -1)
        shared = self.linear(functional.silu(condition)).unflatten(-1, (6, -1))
        of_blocks = [
            modulation_of_block(shared, table, units) for table, units in zip(self.tables, self.units, strict=True)
        ]
        context = self.projection(prompt_embeddings.to(dtype))
        return (*of_blocks, condition[:, :, None] + self.head_table, context, (1 - prompt_mask.to(dtype)) * MASKED)


def blocks_of_latte(model: LatteTransformer3DModel) -> list[BasicTransformerBlock]:
    """Return a model's blocks in the order in which they run: spatial, temporal, spatial, …."""
    pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    return [block for pair in pairs for block in pair]


def spatial_units(block: BasicTransformerBlock) -> tuple[Unit, ...]:
    """Return a spatial block's attention, cross-attention and MLP; its table belongs to the condition part."""
    return (
        Unit("attention", block.norm1, SpatialAttention(SelfAttention(block.attn1)), _FRAMES),
        Unit("cross_attention", nn.Identity(), CrossAttention(block.attn2), ("context", "context_bias")),
        Unit("mlp", block.norm2, block.ff),
    )


def temporal_units(block: BasicTransformerBlock) -> tuple[Unit, ...]:
    """Return a temporal block's attention and MLP."""
    attention = TemporalAttention(SelfAttention(block.attn1))
    return Unit("temporal_attention", block.norm1, attention, _FRAMES), Unit("mlp", block.norm2, block.ff)


def modules_of_latte(model: LatteTransformer3DModel, precision: DType) -> FamilyModules:
    """Return what the parts of diffusers' model are made of."""
    blocks = [
        units_of(block)
        for pair in zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
        for units_of, block in zip((spatial_units, temporal_units), pair, strict=True)
    ]
    width = model.temp_pos_embed.shape[-1]
    blocks[1] = (Unit("temporal_positions", nn.Identity(), TemporalPositions(width), _FRAMES), *blocks[1])
    return FamilyModules(
        embed=EmbedPart(model),
        condition=ConditionModule(model, [tuple(unit.name for unit in block) for block in blocks]),
        blocks=blocks,
        head=HeadPart(
            model.norm_out,
            model.proj_out,
            patch=(1, model.config.patch_size, model.config.patch_size),
            channels=model.config.in_channels,
        ),
        context=(
            TensorSpec(name="context", dtype=precision, shape=(ROWS, PROMPT_TOKENS, width)),
            TensorSpec(name="context_bias", dtype=precision, shape=(ROWS, PROMPT_TOKENS)),
        ),
    )
