"""A DiT in the layout of facebookresearch/DiT's checkpoints, for training: same parameter names, same arithmetic.

Written from the paper (arXiv 2212.09748). Letters: B images, N tokens, D width, C channels, P patch side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def timestep_embedding(timesteps: Tensor, channels: int, *, freq_shift: int) -> Tensor:
    """Return cosines then sines of `timesteps`, (B, channels) float32.

    facebookresearch/DiT divides the exponent by `channels / 2`, diffusers by `channels / 2 - freq_shift` with
    `freq_shift` = 1: over 1 000 steps their phases differ by up to a radian, so the two are not interchangeable.
    """
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """Return the fixed 2-D position embedding, (side², width): the column's half first, then the row's."""
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

    def embed(positions: Tensor) -> Tensor:
        angles = positions.reshape(-1, 1).double() * frequencies[None]
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    return torch.cat([embed(columns), embed(rows)], dim=1).float()


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, freq_shift: int) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(timesteps, 256, freq_shift=self.freq_shift))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last row is the null class

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        # Written out: on a CPU in bfloat16 the backward of the fused attention takes half of a training step.
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-1, -2)
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Predicts the noise in images (B, C, H, W) at timesteps (B,) for labels (B,); the null label is `classes`."""

    def __init__(
        self,
        *,
        side: int,
        patch: int,
        channels: int,
        out_channels: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        freq_shift: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.grid = side // patch
        self.out_channels = out_channels
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width, freq_shift)
        self.y_embedder = LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(sincos_position_embedding(width, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """adaLN-zero: every block starts as the identity and the output as zero (§3.2 of the paper)."""
        parameters = dict(self.named_parameters())
        for name, parameter in parameters.items():
            if name == "pos_embed":
                continue
            if "adaLN_modulation" in name or name.startswith("final_layer.linear") or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("y_embedder", "t_embedder")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(self, images: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        x = self.x_embedder(images) + self.pos_embed
        condition = self.t_embedder(timesteps) + self.y_embedder(labels)
        for block in self.blocks:
            x = block(x, condition)
        return self._unpatchify(self.final_layer(x, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        grid, patch = self.grid, self.patch
        pixels = tokens.reshape(-1, grid, grid, patch, patch, self.out_channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, grid * patch, grid * patch)
