"""Open-Sora's STDiT as parts: embed, condition, blocks and head, made of its own submodules.

Spatial and temporal blocks alternate, and each is a block of its own; a clip's frames share the tokens' axis, frame by
frame. Frames that are given rather than made (Open-Sora's masks, for a clip that goes on from an image) have no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from torch import Tensor, nn

from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.adaln_single import CONTEXT, AdaLNSingle, context_specs
from adacorr_deploy.exporters.clip_attention import SpatialAttention, TemporalAttention
from adacorr_deploy.exporters.family_parts import FamilyModules, repeated
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.stdit import Block, STDiT, grid_positions
from adacorr_deploy.exporters.units import Unit

UNITS_OF_BLOCK: Final = ("attention", "cross_attention", "mlp")  # of a spatial one
UNITS_OF_TEMPORAL_BLOCK: Final = ("temporal_attention", "cross_attention", "mlp")


class EmbedPart(nn.Module):
    """Latents to tokens, once, then repeated for every guidance branch."""

    def __init__(self, model: STDiT) -> None:
        super().__init__()
        self.embedder = model.x_embedder
        self.size = model.size
        self.base_side = model.base_side

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (R, F·S, D) of `latents` (B, C, F, H, W) and `branches` (K,) of ones."""
        rows, columns = (side // self.size.patch for side in latents.shape[3:])
        tokens = self.embedder(latents.to(self.embedder.proj.weight.dtype)).flatten(3).permute(0, 2, 3, 1)
        placed = tokens.float() + grid_positions(rows, columns, self.size, self.base_side)
        return (repeated(placed.to(tokens.dtype).flatten(1, 2), branches),)


class ConditionModule(AdaLNSingle):
    """Timesteps, frame rates and prompts to what a condition part gives."""

    def __init__(self, model: STDiT) -> None:
        tables = [block.scale_shift_table for pair in model.pairs() for block in pair]
        super().__init__(
            linear=cast(nn.Linear, model.t_block[1]),
            tables=tables,
            units=[UNITS_OF_BLOCK] * len(tables),  # a temporal block's are modulated alike
            head_table=model.final_layer.scale_shift_table,
            projection=model.y_embedder.y_proj,
        )
        self.timestep_embedder = model.t_embedder
        self.frame_rate_embedder = model.fps_embedder

    def forward(
        self, timesteps: Tensor, frame_rate: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Return `outputs`.

        Args:
            timesteps: (S,) float32, 1000 for noise and 0 for a clip.
            frame_rate: (R,) float32, frames per second.
            prompt_embeddings: (R, T, E) float32.
            prompt_mask: (R, T) int64, 1 where a prompt's token is real.
        """
        condition = self.timestep_embedder(timesteps)[:, None] + self.frame_rate_embedder(frame_rate)
        return self.outputs(condition, prompt_embeddings, prompt_mask)


def units_of_blocks(spatial: Block, temporal: Block, frequencies: Sequence[float]) -> list[tuple[Unit, ...]]:
    """Return the units of a spatial block and of the temporal one after it; their tables belong to the condition."""
    attentions = SpatialAttention(spatial.attn), TemporalAttention(temporal.attn, frequencies)
    return [
        (
            Unit(names[0], block.norm1, attention, ("frame_positions",)),
            Unit(names[1], nn.Identity(), block.cross_attn, CONTEXT),
            Unit(names[2], block.norm2, block.mlp),
        )
        for block, attention, names in zip(
            (spatial, temporal), attentions, (UNITS_OF_BLOCK, UNITS_OF_TEMPORAL_BLOCK), strict=True
        )
    ]


def noise_minus_clip(model: STDiT) -> nn.Linear:
    """Return the final projection to what flow matching predicts everywhere else: Open-Sora's has the other sign.

    It keeps the velocity's channels alone; the variance that follows them was never trained.
    """
    layer, size = model.final_layer.linear, model.size
    projection = nn.Linear(size.width, size.patch**2 * size.channels)
    for name, value in layer.named_parameters():
        velocity = value.unflatten(0, (-1, size.out_channels))[:, : size.channels].flatten(0, 1)
        setattr(projection, name, nn.Parameter(-velocity, requires_grad=False))
    return projection


def modules_of_stdit(model: STDiT, precision: DType) -> FamilyModules:
    """Return what the parts of a model are made of."""
    size, frequencies = model.size, model.rope.freqs.tolist()
    return FamilyModules(
        embed=EmbedPart(model),
        condition=ConditionModule(model),
        blocks=[block for pair in model.pairs() for block in units_of_blocks(*pair, frequencies)],
        head=HeadPart(
            model.final_layer.norm_final,
            noise_minus_clip(model),
            patch=(1, size.patch, size.patch),
            channels=size.channels,
        ),
        context=context_specs(tokens=size.prompt_tokens, width=size.width, precision=precision),
    )
