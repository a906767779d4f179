"""Open-Sora 1.2's video transformer (STDiT3), whose weights have the names of its checkpoints.

No package holds the class, so this module is what bundles of it are compared with. It was written from the model's
description, and its outputs were compared with those of the published code (hpcaitech/Open-Sora, tag v1.2.0, with its
xformers kernel replaced by plain attention): with equal weights they differ by 3e-6 to 6e-6, relative, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.exporters.adaln_single import context_bias

NORM_EPSILON: Final = 1e-6  # of every norm
PIXELS_PER_LATENT: Final = 8  # along an axis of a frame: Open-Sora's VAE
_WAVES: Final = 256  # features of the sinusoid that embeds a timestep or a frame rate


@dataclass(frozen=True, slots=True, kw_only=True)
class STDiTSize:
    """What shapes a model."""

    width: int  # D
    heads: int
    depth: int  # spatial blocks, and as many temporal ones
    patch: int  # latent pixels along an axis of a frame; a patch never spans frames
    channels: int  # C
    out_channels: int  # 2C with a variance, which rectified flow doesn't use
    prompt_width: int  # E
    prompt_tokens: int  # T

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    """Scales features to a root mean square of 1, in float32 whatever the weights' precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPSILON)
        return self.weight * scaled.to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention with normalised queries and keys, rotated by position where positions are given."""

    def __init__(self, size: STDiTSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.q_norm = RMSNorm(size.head_width)
        self.k_norm = RMSNorm(size.head_width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Return the result (B, N, D) of `x` (B, N, D) and rotation `angles` (N, D/heads/2) float32, if any."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if angles is not None:
            query, key = rotated(query, angles), rotated(key, angles)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        result: Tensor = self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        return result


class CrossAttention(nn.Module):
    """Multi-head attention of the tokens to a prompt's."""

    def __init__(self, size: STDiTSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.q_linear = nn.Linear(size.width, size.width)
        self.kv_linear = nn.Linear(size.width, 2 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor, context: Tensor, context_bias: Tensor) -> Tensor:
        """Return the result (R, N, D) of `x` (R, N, D), the prompt (R, T, D) and what its scores get added (R, T)."""
        query = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv_linear(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2) + context_bias[:, None, None, :]
        result: Tensor = self.proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    """Two layers with a GELU, by its tanh formula, between them."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return result


class Block(nn.Module):
    """A spatial or a temporal block: the same weights, but for what its self-attention runs over."""

    def __init__(self, size: STDiTSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=NORM_EPSILON, elementwise_affine=False)
        self.attn = SelfAttention(size)
        self.cross_attn = CrossAttention(size)
        self.norm2 = nn.LayerNorm(size.width, eps=NORM_EPSILON, elementwise_affine=False)
        self.mlp = MLP(size.width, 4 * size.width, size.width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, size.width) / size.width**0.5)

    def forward(
        self, tokens: Tensor, modulation: Tensor, context: Tensor, bias: Tensor, angles: Tensor | None = None
    ) -> Tensor:
        """Return the next tokens (R, G, L, D).

        Args:
            tokens: (R, G, L, D): self-attention runs over L, frames or places of a frame; G are the others.
            modulation: (R, 6, D), shared by all blocks.
            context: (R, T, D), the prompt.
            bias: (R, T), added to the scores of cross-attention.
            angles: (L, D/heads/2) float32, of a temporal block.
        """
        groups = tokens.shape[:2]
        rows = (self.scale_shift_table + modulation)[:, None].chunk(6, dim=2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows
        result = self.attn((self.norm1(tokens) * (1 + scale) + shift).flatten(0, 1), angles)
        tokens = tokens + gate * result.unflatten(0, groups)
        result = self.cross_attn(tokens.flatten(1, 2), context, bias)
        tokens = tokens + result.unflatten(1, tokens.shape[1:3])
        result = self.mlp(self.norm2(tokens) * (1 + mlp_scale) + mlp_shift)
        return tokens + mlp_gate * cast(Tensor, result)


class WaveEmbedder(nn.Module):
    """Embeds numbers, a timestep or a frame rate, by sinusoids and two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """Return (X, D) of `values` (X,); the sinusoid is float32 whatever the weights' precision."""
        half = _WAVES // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float32) / half)
        phases = values.float()[:, None] * frequencies
        waves = torch.cat([phases.cos(), phases.sin()], dim=-1)
        result: Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return result


class PatchEmbedder(nn.Module):
    """Latents to tokens, without positions."""

    def __init__(self, size: STDiTSize) -> None:
        super().__init__()
        patch = (1, size.patch, size.patch)
        self.proj = nn.Conv3d(size.channels, size.width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """Return (B, D, F, H/p, W/p) of `latents` (B, C, F, H, W)."""
        result: Tensor = self.proj(latents)
        return result


class PromptEmbedder(nn.Module):
    """Projects a prompt's embeddings, and keeps those that stand for no prompt."""

    y_embedding: Tensor

    def __init__(self, size: STDiTSize) -> None:
        super().__init__()
        self.y_proj = MLP(size.prompt_width, size.width, size.width)
        self.register_buffer("y_embedding", torch.randn(size.prompt_tokens, size.prompt_width))

    def forward(self, prompt_embeddings: Tensor) -> Tensor:
        result: Tensor = self.y_proj(prompt_embeddings)
        return result


class FinalLayer(nn.Module):
    """The last norm and what makes patches of tokens."""

    def __init__(self, size: STDiTSize) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(size.width, eps=NORM_EPSILON, elementwise_affine=False)
        self.linear = nn.Linear(size.width, size.patch**2 * size.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, size.width) / size.width**0.5)


class Rotation(nn.Module):
    """The frequencies of the rotary position embedding, which checkpoints hold although they are never trained."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(rotation_frequencies(head_width))


class STDiT(nn.Module):
    """The whole model.

    Args of `forward`:
        latents: (R, C, F, H, W).
        timesteps: (R,), 1000 for noise and 0 for a clip.
        prompt_embeddings: (R, T, E).
        prompt_mask: (R, T) int64, 1 where a prompt's token is real; at least one of a row is.
        frame_rate: (R,), frames per second.

    It returns (R, C or 2C, F, H, W): the velocity clip − noise, and the variance that rectified flow doesn't use.
    """

    def __init__(self, size: STDiTSize, base_side: int = 512) -> None:
        super().__init__()
        self.size = size
        self.base_side = base_side  # pixels along a frame for which positions are unscaled
        self.rope = Rotation(size.head_width)
        self.x_embedder = PatchEmbedder(size)
        self.t_embedder = WaveEmbedder(size.width)
        self.fps_embedder = WaveEmbedder(size.width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(size.width, 6 * size.width))
        self.y_embedder = PromptEmbedder(size)
        self.spatial_blocks = nn.ModuleList([Block(size) for _ in range(size.depth)])
        self.temporal_blocks = nn.ModuleList([Block(size) for _ in range(size.depth)])
        self.final_layer = FinalLayer(size)

    def pairs(self) -> Iterator[tuple[Block, Block]]:
        """Yield each spatial block with the temporal one after it."""
        spatial, temporal = (cast(Iterable[Block], blocks) for blocks in (self.spatial_blocks, self.temporal_blocks))
        return zip(spatial, temporal, strict=True)

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor, frame_rate: Tensor
    ) -> Tensor:
        rows, _, frames, height, width = latents.shape
        grid = (height // self.size.patch, width // self.size.patch)
        tokens = self.x_embedder(latents).flatten(3).permute(0, 2, 3, 1)  # (R, F, S, D)
        tokens = (tokens + grid_positions(*grid, self.size, self.base_side)).flatten(1, 2)
        condition = self.t_embedder(timesteps) + self.fps_embedder(frame_rate)
        modulation = self.t_block(condition).unflatten(-1, (6, -1))
        context, bias = self.y_embedder(prompt_embeddings), context_bias(prompt_mask, latents.dtype)
        angles = torch.arange(frames).float()[:, None] * self.rope.freqs
        for spatial, temporal in self.pairs():
            tokens = spatial(tokens.unflatten(1, (frames, -1)), modulation, context, bias).flatten(1, 2)
            places = tokens.unflatten(1, (frames, -1)).transpose(1, 2)
            tokens = temporal(places, modulation, context, bias, angles).transpose(1, 2).flatten(1, 2)
        shift, scale = (self.final_layer.scale_shift_table + condition[:, None]).chunk(2, dim=1)
        patches: Tensor = self.final_layer.linear(self.final_layer.norm_final(tokens) * (1 + scale) + shift)
        pixels = patches.reshape(rows, frames, *grid, self.size.patch, self.size.patch, self.size.out_channels)
        return pixels.permute(0, 6, 1, 2, 4, 3, 5).reshape(rows, self.size.out_channels, frames, height, width)


def rotation_frequencies(head_width: int) -> Tensor:
    """Return the frequencies of rotary positions (arXiv 2104.09864), (head_width / 2,)."""
    return 10000 ** (-torch.arange(0, head_width, 2).float() / head_width)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of neighbouring features of `x` (B, heads, N, d) by `angles` (N, d/2) float32."""
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1).flatten(-2)


def grid_positions(rows: int, columns: int, size: STDiTSize, base_side: int) -> Tensor:
    """Return the positions (S, D) float32 of a frame of `rows` × `columns` patches.

    They are scaled so that frames of any resolution and shape span what a square frame of `base_side` pixels does.
    """
    ones = torch.ones(rows, columns)
    patches = ones.sum()  # as a tensor, so that it stays symbolic where the size is
    side = PIXELS_PER_LATENT * size.patch * patches.sqrt()  # of the square frame of as many pixels
    unit = patches.sqrt().round() * base_side / side
    frequencies = 10000 ** (-torch.arange(0, size.width // 2, 2).float() / (size.width // 2))

    def waves(count: int) -> Tensor:
        position = torch.arange(count).float()
        phases = (position * unit / torch.ones(count).sum())[:, None] * frequencies
        return torch.cat([phases.sin(), phases.cos()], dim=-1)

    across, down = waves(columns)[None].expand(rows, -1, -1), waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)
