"""A text-to-image transformer of this test suite's own: cross-attention, adaLN-single, positions of any size.

What no released family has in so small a form: three units per block, one of them without norm, modulation or gate, a
context of two tensors, height and width that requests choose, and a null prompt in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec, PromptSpec, units_of_parts
from adacorr_deploy.exporters.adaln_single import CONTEXT, context_specs
from adacorr_deploy.exporters.family_parts import FamilyModules, repeated
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.units import Unit

CHANNELS, PATCH, WIDTH, HEADS, DEPTH, SIDE = 3, 2, 16, 2, 3, 8
PROMPT = PromptSpec(tokens=5, width=12)


def waves(positions: Tensor, width: int) -> Tensor:
    """Return sines and cosines of numbers (N,), (N, width)."""
    rates = torch.exp(torch.arange(width // 2, dtype=torch.float32) * (-math.log(10_000.0) / (width // 2)))
    phases = positions[:, None] * rates
    return torch.cat([phases.sin(), phases.cos()], dim=1)


class Attention(nn.Module):
    """Attention over the tokens themselves, or over a context."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """(R, N, D), and of a context (R, T, D) with its bias (R, T) → (R, N, D)."""
        source = tokens if context is None else context
        query, key, value = (
            each.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for each in (self.query(tokens), self.key(source), self.value(source))
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        scores = scores if bias is None else scores + bias[:, None, None]
        return self.out((scores.softmax(3) @ value).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, tokens: Tensor, context: Tensor, context_bias: Tensor) -> Tensor:
        return self.attention(tokens, context, context_bias)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attention, self.cross = Attention(), Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, tokens: Tensor, time: Tensor, context: Tensor, bias: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + time.unflatten(1, (6, -1))).chunk(6, dim=1)
        tokens = tokens + gate1 * self.attention(self.norm1(tokens) * (1 + scale1) + shift1)
        tokens = tokens + self.cross(tokens, context, bias)
        return tokens + gate2 * self.mlp(self.norm2(tokens) * (1 + scale2) + shift2)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)

    def forward(self, latents: Tensor) -> Tensor:
        grid = self.projection(latents)
        rows, columns = grid.shape[2:]
        down = waves(torch.arange(rows, dtype=torch.float32), WIDTH // 2)[:, None].expand(-1, columns, -1)
        across = waves(torch.arange(columns, dtype=torch.float32), WIDTH // 2)[None].expand(rows, -1, -1)
        positions = torch.cat([down, across], dim=2).flatten(0, 1).to(grid.dtype)
        return grid.flatten(2).transpose(1, 2) + positions


class Time(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, timesteps: Tensor) -> Tensor:
        embedded: Tensor = self.out(functional.silu(self.into(waves(timesteps.float(), WIDTH).to(self.into.weight))))
        return embedded


class TextToImage(nn.Module):
    """The whole model, as its own library would run it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.time = Patches(), Time()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.caption = nn.Linear(PROMPT.width, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.table = nn.Parameter(torch.randn(2, WIDTH))
        self.out = nn.Linear(WIDTH, PATCH * PATCH * CHANNELS)
        self.null_prompt = nn.Parameter(torch.randn(PROMPT.tokens, PROMPT.width))

    def forward(self, latents: Tensor, timesteps: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor) -> Tensor:
        context = self.caption(prompt_embeddings)
        bias = (1.0 - prompt_mask.float()) * -10_000.0
        time = self.time(timesteps)
        modulation = self.modulation(functional.silu(time))
        tokens = self.patches(latents)
        for block in self.blocks:
            tokens = block(tokens, modulation, context, bias)
        shift, scale = (self.table + time[:, None]).chunk(2, dim=1)
        patches = self.out(self.norm(tokens) * (1 + scale) + shift)
        batch, height, width = len(latents), latents.shape[2] // PATCH, latents.shape[3] // PATCH
        pixels = patches.reshape(batch, height, width, PATCH, PATCH, CHANNELS)
        return torch.einsum("nhwpqc->nchpwq", pixels).reshape(latents.shape)


class Embed(nn.Module):
    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        return (repeated(self.patches(latents.to(self.patches.projection.weight)), branches),)


class Condition(nn.Module):
    def __init__(self, model: TextToImage) -> None:
        super().__init__()
        self.time, self.modulation, self.caption = model.time, model.modulation, model.caption
        self.tables = nn.ParameterList([block.table for block in map(_block, model.blocks)])
        self.head_table = model.table

    def forward(self, timesteps: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        dtype = self.head_table.dtype
        time = self.time(timesteps)
        steps, rows = timesteps.shape[0], prompt_embeddings.shape[0]
        shared = self.modulation(functional.silu(time)).unflatten(1, (6, -1))[:, None].expand(-1, rows, -1, -1)
        ungated = torch.cat([torch.zeros(2, WIDTH, dtype=dtype), torch.ones(1, WIDTH, dtype=dtype)])
        ungated = ungated.expand(steps, rows, -1, -1)
        of_blocks = []
        for table in self.tables:
            attention, mlp = (shared + table).split(3, dim=2)
            of_blocks.append(torch.cat([attention, ungated, mlp], dim=2))
        head = (time[:, None].unflatten(2, (1, -1)) + self.head_table).expand(-1, rows, -1, -1)
        bias = ((1.0 - prompt_mask.float()) * -10_000.0).to(dtype)
        return (*of_blocks, head, self.caption(prompt_embeddings.to(dtype)), bias)


@dataclass(frozen=True, slots=True)
class TextToImageModel:
    """The model for the exporter."""

    module: TextToImage
    learned_variance: bool = False

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        names = ("prompt_embeddings", "prompt_mask")
        result: Tensor = self.module(latents, timesteps, **{name: conditions[name] for name in names})
        return result

    def null_prompt(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return self.module.null_prompt.detach().numpy(), np.ones(PROMPT.tokens, dtype=np.int64)

    def training_schedule(self) -> NoiseSchedule:
        return NoiseSchedule(betas=tuple(np.linspace(1e-4, 0.02, 1000).tolist()))

    def spec(self, precision: DType, segment: int) -> ModelSpec:
        blocks = (("attention", "cross_attention", "mlp"),) * DEPTH
        return ModelSpec(
            family="text-to-image",
            precision=precision,
            latents=LatentSpec(shape=(CHANNELS, SIDE, SIDE), patch=(PATCH, PATCH), largest=(32, 32)),
            width=WIDTH,
            conditions=ConditionSpec(prompt=PROMPT),
            blocks=blocks,
            units=units_of_parts(blocks, segment),
            learned_variance=False,
        )

    def modules(self, precision: DType) -> FamilyModules:
        model = self.module
        return FamilyModules(
            embed=Embed(model.patches),
            condition=Condition(model),
            blocks=[
                (
                    Unit("attention", block.norm1, block.attention),
                    Unit("cross_attention", nn.Identity(), CrossAttention(block.cross), CONTEXT),
                    Unit("mlp", block.norm2, block.mlp),
                )
                for block in map(_block, model.blocks)
            ],
            head=HeadPart(model.norm, model.out, patch=(PATCH, PATCH), channels=CHANNELS),
            context=context_specs(tokens=PROMPT.tokens, width=WIDTH, precision=precision),
        )


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module


def random_text_to_image(seed: int = 0) -> TextToImageModel:
    torch.manual_seed(seed)
    module = TextToImage()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.25)
    return TextToImageModel(module.eval().requires_grad_(False))
