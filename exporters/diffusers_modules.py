"""Modules of diffusers that several families have, in the forms that compile best.

Attention has joined projections and no library-specific op. The joined weights depend on weights alone, so the exporter
stores them joined. The scores stay decomposed because TensorRT for RTX has no float32 kernel for ONNX's own Attention
op; scale, product, bias, softmax, product is the sequence that it fuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.exporters.family_parts import repeated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers.models.attention_processor import Attention

_PERIOD: Final = 10000  # of the slowest position wave, over 2π


class PatchEmbedPart(nn.Module):
    """Latents of any size, of images or clips, to tokens with positions, once, then repeated for every guidance branch.

    Positions are those of the size of a frame, and made as diffusers makes them.
    """

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.proj = embed.proj
        self.extent = embed.base_size / embed.interpolation_scale  # positions go from 0 up to this, at any size

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (R, N, D) in the precision of the weights, a clip's frame by frame.

        Args:
            latents: (B, C, H, W), or (B, C, F, H, W), float32.
            branches: (K,) of ones.
        """
        if latents.dim() == 4:
            return (repeated(self._tokens(latents), branches),)
        frames = self._tokens(latents.transpose(1, 2).flatten(0, 1))
        return (repeated(frames.reshape(latents.shape[0], -1, frames.shape[-1]), branches),)

    def _tokens(self, images: Tensor) -> Tensor:
        """Return (B, N, D) of `images` (B, C, H, W)."""
        patches: Tensor = self.proj(images.to(self.proj.weight.dtype))
        (rows, columns), width = patches.shape[2:], self.proj.out_channels // 2
        of_columns, of_rows = (
            position_waves(torch.arange(count, dtype=torch.float32) * (self.extent / count), width)
            for count in (columns, rows)
        )
        places = of_columns[None].expand(rows, -1, -1), of_rows[:, None].expand(-1, columns, -1)
        positions = torch.cat(places, dim=-1).flatten(0, 1)
        return (patches.flatten(2).transpose(1, 2).float() + positions).to(patches.dtype)


class SelfAttention(nn.Module):
    """A block's attention: diffusers' own, or, while it is traced, the form that compiles best."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Return the result (R, N, D) of `x`, the normalised, scaled and shifted tokens."""
        fused = torch.compiler.is_exporting()
        result: Tensor = fused_self_attention(self.attention, x) if fused else self.attention(x)
        return result


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


def compute_positions(embed: PatchEmbed) -> None:
    """Give an embedding that was made on the meta device its positions: no weights, and computed as diffusers does."""
    computed = PatchEmbed(
        embed.height * embed.patch_size,
        embed.width * embed.patch_size,
        embed.patch_size,
        in_channels=1,
        embed_dim=embed.proj.out_channels,
        interpolation_scale=embed.interpolation_scale,
    )
    embed.register_buffer("pos_embed", computed.pos_embed, persistent=False)


def position_waves(positions: Tensor, width: int) -> Tensor:
    """Return sine and cosine of positions (X,) float32 at each of `width` / 2 frequencies, (X, width) float32."""
    half = width // 2
    frequencies = torch.tensor([_PERIOD ** -(index / half) for index in range(half)], dtype=torch.float32)
    phases = positions[:, None] * frequencies
    return torch.cat([phases.sin(), phases.cos()], dim=-1)


def fused_self_attention(attention: Attention, x: Tensor) -> Tensor:
    """Return what diffusers' `Attention` returns for plain self-attention, (R, N, D)."""
    query, key, value = _projected((attention.to_q, attention.to_k, attention.to_v), x, attention.heads)
    return _mixed(attention, query, key, value)


def fused_cross_attention(attention: Attention, x: Tensor, context: Tensor, context_bias: Tensor) -> Tensor:
    """Return what diffusers' `Attention` returns for tokens that look at a context, (R, N, D).

    Args:
        attention: diffusers' module.
        x: (R, N, D), the queries.
        context: (R, T, E), keys and values.
        context_bias: (R, T), added to the scores: 0 where the context is real, very negative where it is padding.
    """
    (query,) = _projected((attention.to_q,), x, attention.heads)
    key, value = _projected((attention.to_k, attention.to_v), context, attention.heads)
    return _mixed(attention, query, key, value, context_bias[:, None, None])


def _projected(projections: Sequence[nn.Linear], x: Tensor, heads: int) -> Sequence[Tensor]:
    """Return the projections of `x` (R, N, E) by head, (R, H, N, D/H) each, from one product."""
    weight = torch.cat([projection.weight for projection in projections])
    biases: list[Tensor | None] = [projection.bias for projection in projections]
    bias = torch.cat([each for each in biases if each is not None]) if biases[0] is not None else None
    head_width = weight.shape[0] // len(projections) // heads
    joined = functional.linear(x, weight, bias).reshape(-1, x.shape[1], len(projections), heads, head_width)
    return joined.permute(2, 0, 3, 1, 4).unbind()


def _mixed(attention: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the values as the queries weigh them, projected: (R, N, D) of (R, H, N, D/H)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    result: Tensor = attention.to_out[0](mixed)
    return result
