"""PixArt-α and Σ as parts: embed, condition, blocks and head, made of diffusers' own submodules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.adaln_single import CONTEXT, AdaLNSingleCondition, context_specs
from adacorr_deploy.exporters.diffusers_modules import CrossAttention, PatchEmbedPart, SelfAttention
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.units import Unit

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock

UNITS: Final = ("attention", "cross_attention", "mlp")  # of a block
PIXELS_PER_LATENT: Final = 8  # of an image's side, by the VAE that every PixArt was trained with


class SizedCondition(AdaLNSingleCondition):
    """The condition of models that are also told the image's size."""

    def forward(  # type: ignore[override]  # the contract is made of the arguments' names
        self, timesteps: Tensor, latent_size: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """Return what the base does; `latent_size` (3,) float32: frames (1), height and width of the latents."""
        height, width = (latent_size[1:] * PIXELS_PER_LATENT).chunk(2)
        resolution = self.embedded(self.embedder.resolution_embedder, torch.cat([height, width])).flatten()
        aspect = self.embedded(self.embedder.aspect_ratio_embedder, height / width).flatten()
        condition = self.of_timesteps(timesteps) + torch.cat([resolution, aspect])
        return self.for_rows(condition, prompt_embeddings, prompt_mask)


def units_of_block(block: BasicTransformerBlock) -> tuple[Unit, ...]:
    """Return a block's attention, cross-attention and MLP; its table belongs to the condition part."""
    attention, cross_attention, mlp = UNITS
    return (
        Unit(attention, block.norm1, SelfAttention(block.attn1)),
        Unit(cross_attention, nn.Identity(), CrossAttention(block.attn2), inputs=CONTEXT),
        Unit(mlp, block.norm2, block.ff),  # diffusers applies `norm2` here, and none before the cross-attention
    )


def modules_of_pixart(model: PixArtTransformer2DModel, *, prompt_tokens: int, precision: DType) -> FamilyModules:
    """Return what the parts of diffusers' model are made of, for prompts of so many tokens."""
    config = model.config
    condition = SizedCondition if model.use_additional_conditions else AdaLNSingleCondition
    return FamilyModules(
        embed=PatchEmbedPart(model.pos_embed),
        condition=condition(model, model.transformer_blocks, [UNITS] * len(model.transformer_blocks)),
        blocks=[units_of_block(block) for block in model.transformer_blocks],
        head=HeadPart(
            model.norm_out,
            model.proj_out,
            patch=(config.patch_size,) * 2,
            channels=config.in_channels,
            uses_variance=False,
        ),
        context=context_specs(tokens=prompt_tokens, width=config.cross_attention_dim, precision=precision),
    )
