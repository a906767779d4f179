"""DiT as parts: embed, condition, blocks and head, made of diffusers' own submodules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT
from adacorr_deploy.exporters.diffusers_modules import SelfAttention
from adacorr_deploy.exporters.family_parts import FamilyModules, repeated
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.units import Unit

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

UNITS: Final = ("attention", "mlp")  # of a block


class EmbedPart(nn.Module):
    """Latents to tokens, once, then repeated for every guidance branch."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (R, N, D) of `latents` (B, C, H, W) and `branches` (K,) of ones."""
        dtype = self.pos_embed.proj.weight.dtype
        return (repeated(self.pos_embed(latents.to(dtype)), branches),)


class ConditionModule(nn.Module):
    """Timesteps and labels to the modulation of every block and of the head, for all steps at once."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        super().__init__()
        embedders = [block.norm1.emb for block in model.transformer_blocks]
        if embedders_agree(model):
            embedders = embedders[:1]
        self.embedders = nn.ModuleList(embedders)
        self.linears = nn.ModuleList([block.norm1.linear for block in model.transformer_blocks])
        self.head_linear = model.proj_out_1

    def forward(self, timesteps: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return one (S, R, 6, D) per block, and (S, R, 2, D) for the head.

        Args:
            timesteps: (S,) float32, in training steps.
            labels: (R,) int64; the null label stands for rows without condition.
        """
        conditions = [self._condition(embedder, timesteps, labels) for embedder in self.embedders]
        of_blocks = conditions if len(conditions) > 1 else conditions * len(self.linears)
        rows = [
            linear(condition).unflatten(-1, (MODULATIONS_PER_UNIT * len(UNITS), -1))
            for linear, condition in zip(self.linears, of_blocks, strict=True)
        ]
        return (*rows, self.head_linear(conditions[0]).unflatten(-1, (2, -1)))

    @staticmethod
    def _condition(embedder: CombinedTimestepLabelEmbeddings, timesteps: Tensor, labels: Tensor) -> Tensor:
        # The sinusoid stays float32: at timestep 999 a float16 phase would be off by half a radian.
        waves = embedder.time_proj(timesteps.float()).to(embedder.timestep_embedder.linear_1.weight.dtype)
        steps = embedder.timestep_embedder(waves)
        return functional.silu(steps[:, None] + embedder.class_embedder(labels)[None])


def units_of_block(block: BasicTransformerBlock) -> tuple[Unit, ...]:
    """Return a block's attention and MLP; its embedder and adaLN projection belong to the condition part."""
    attention, mlp = UNITS
    return Unit(attention, block.norm1.norm, SelfAttention(block.attn1)), Unit(mlp, block.norm3, block.ff)


def modules_of_dit(model: DiTTransformer2DModel) -> FamilyModules:
    """Return what the parts of diffusers' model are made of."""
    return FamilyModules(
        embed=EmbedPart(model),
        condition=ConditionModule(model),
        blocks=[units_of_block(block) for block in model.transformer_blocks],
        head=HeadPart(
            model.norm_out,
            model.proj_out_2,
            patch=(model.config.patch_size,) * 2,
            channels=model.config.in_channels,
        ),
    )


def embedders_agree(model: DiTTransformer2DModel) -> bool:
    """Say whether every block embeds timestep and label alike, as in any checkpoint that came from the original."""
    first, *others = [block.norm1.emb for block in model.transformer_blocks]
    weights = first.state_dict()
    return all(
        other is first
        or (
            other.time_proj.downscale_freq_shift == first.time_proj.downscale_freq_shift
            and all(torch.equal(weights[name], value) for name, value in other.state_dict().items())
        )
        for other in others
    )
