"""PixArt-α and Σ as parts: embed, condition, blocks and head, made of diffusers' own submodules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.adaln_single import CONTEXT, AdaLNSingleCondition, context_specs
from adacorr_deploy.exporters.dit import SelfAttention
from adacorr_deploy.exporters.family_parts import FamilyModules, repeated
from adacorr_deploy.exporters.fused_attention import fused_cross_attention
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.units import Unit

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import PatchEmbed

UNITS: Final = ("attention", "cross_attention", "mlp")  # of a block
PIXELS_PER_LATENT: Final = 8  # of an image's side, by the VAE that every PixArt was trained with
_PERIOD: Final = 10000  # of the slowest position wave, over 2π


class Embed(nn.Module):
    """Latents to tokens, once, then repeated for every guidance branch."""

    def __init__(self, model: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.tokens = PatchTokens(model.pos_embed)

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (R, N, D) of `latents` (B, C, H, W) and `branches` (K,) of ones."""
        return (repeated(self.tokens(latents), branches),)


class PatchTokens(nn.Module):
    """Latents of any size to tokens with positions, which are made for that size as diffusers makes them."""

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj
        self.patch = embed.patch_size
        self.extent = embed.base_size / embed.interpolation_scale  # positions go from 0 up to this, at any size
        quarter = embed.proj.out_channels // 4
        waves = torch.arange(quarter, dtype=torch.float64) / quarter
        self.frequencies = (1.0 / _PERIOD**waves).tolist()  # no buffer: float32 in any precision

    def forward(self, latents: Tensor) -> Tensor:
        """Return (B, N, D), in the precision of the weights, of `latents` (B, C, H, W)."""
        patches = self.proj(latents.to(self.proj.weight.dtype))
        rows, columns = patches.shape[2:]
        of_columns, of_rows = self._waves(columns)[None].expand(rows, -1, -1), self._waves(rows)[:, None]
        positions = torch.cat([of_columns, of_rows.expand(-1, columns, -1)], dim=-1).flatten(0, 1)
        tokens: Tensor = (patches.flatten(2).transpose(1, 2).float() + positions).to(patches.dtype)
        return tokens

    def _waves(self, count: int) -> Tensor:
        """Return sine and cosine of so many positions along an axis, (count, D/2) float32."""
        positions = torch.arange(count, dtype=torch.float32) * (self.extent / count)
        phases = positions[:, None] * torch.tensor(self.frequencies, dtype=torch.float32)
        return torch.cat([phases.sin(), phases.cos()], dim=-1)


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
        return self.outputs(condition, prompt_embeddings, prompt_mask)


class CrossAttention(nn.Module):
    """A block's look at the prompt: diffusers' own, or, while it is traced, the form that compiles best."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, context: Tensor, context_bias: Tensor) -> Tensor:
        """Return the result (R, N, D) of tokens `x`, context (R, T, E) and what is added to its scores (R, T)."""
        if torch.compiler.is_exporting():
            return fused_cross_attention(self.attention, x, context, context_bias)
        result: Tensor = self.attention(x, encoder_hidden_states=context, attention_mask=context_bias[:, None])
        return result


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
        embed=Embed(model),
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
