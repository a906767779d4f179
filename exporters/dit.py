"""DiT as parts: embed, condition, blocks and head, made of diffusers' own submodules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.specs import BLOCK_UNITS, MODULATIONS_PER_UNIT
from adacorr_deploy.exporters.fused_attention import fused_self_attention
from adacorr_deploy.exporters.sampler_update import sampler_update

if TYPE_CHECKING:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings


class EmbedPart(nn.Module):
    """Latents to tokens, once, then repeated for every guidance branch."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        super().__init__()
        self.pos_embed = model.pos_embed

    def forward(self, latents: Tensor, branches: Tensor) -> tuple[Tensor, ...]:
        """Return tokens (R, N, D) of `latents` (B, C, H, W) and `branches` (K,) of ones."""
        dtype = self.pos_embed.proj.weight.dtype
        tokens = self.pos_embed(latents.to(dtype))
        repeated = branches.to(dtype)[:, None, None, None] * tokens[None]
        return (repeated.reshape(-1, *tokens.shape[1:]),)


class ConditionPart(nn.Module):
    """Timesteps and labels to the modulation of every block and of the head, for all steps at once."""

    def __init__(self, model: DiTTransformer2DModel, units: Sequence[int]) -> None:
        super().__init__()
        embedders = [block.norm1.emb for block in model.transformer_blocks]
        if embedders_agree(model):
            embedders = embedders[:1]
        self.embedders = nn.ModuleList(embedders)
        self.linears = nn.ModuleList([block.norm1.linear for block in model.transformer_blocks])
        self.rows = [MODULATIONS_PER_UNIT * count for count in units]  # of modulation, by block part
        self.head_linear = model.proj_out_1

    def forward(self, timesteps: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return one (S, R, 3U, D) per block part, and (S, R, 2, D) for the head.

        Args:
            timesteps: (S,) float32, in training steps.
            labels: (R,) int64; the null label stands for rows without condition.
        """
        conditions = [self._condition(embedder, timesteps, labels) for embedder in self.embedders]
        of_blocks = conditions if len(conditions) > 1 else conditions * len(self.linears)
        rows = [
            linear(condition).unflatten(-1, (MODULATIONS_PER_UNIT * BLOCK_UNITS, -1))
            for linear, condition in zip(self.linears, of_blocks, strict=True)
        ]
        return (*self._of_parts(rows), self.head_linear(conditions[0]).unflatten(-1, (2, -1)))

    def _of_parts(self, of_blocks: list[Tensor]) -> list[Tensor]:
        """Join the blocks' rows of a part, or cut a block's rows for its halves."""
        block_rows = of_blocks[0].shape[2]
        if all(count < block_rows for count in self.rows):
            return [part for rows in of_blocks for part in rows.split(self.rows[0], dim=2)]
        blocks = iter(of_blocks)
        return [torch.cat([next(blocks) for _ in range(count // block_rows)], dim=2) for count in self.rows]

    @staticmethod
    def _condition(embedder: CombinedTimestepLabelEmbeddings, timesteps: Tensor, labels: Tensor) -> Tensor:
        # The sinusoid stays float32: at timestep 999 a float16 phase would be off by half a radian.
        waves = embedder.time_proj(timesteps.float()).to(embedder.timestep_embedder.linear_1.weight.dtype)
        steps = embedder.timestep_embedder(waves)
        return functional.silu(steps[:, None] + embedder.class_embedder(labels)[None])


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


@dataclass(frozen=True, slots=True)
class Unit:
    """What a transformer block adds to its tokens at a time: the result of one module on its normalised input."""

    norm: nn.Module
    body: nn.Module


def units_of_block(block: BasicTransformerBlock) -> tuple[Unit, Unit]:
    """Return a block's attention and MLP; its embedder and adaLN projection belong to the condition part."""
    return Unit(block.norm1.norm, SelfAttention(block.attn1)), Unit(block.norm3, block.ff)


class UnitsPart(nn.Module):
    """Consecutive units, whole blocks or a half of one, which also returns their results before the adaLN gates."""

    def __init__(self, units: Sequence[Unit], *, returns_units: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList([unit.norm for unit in units])
        self.bodies = nn.ModuleList([unit.body for unit in units])
        self.returns_units = returns_units

    def forward(self, tokens: Tensor, modulation: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Return the next tokens, and the units' results in order, each (R, N, D).

        Args:
            tokens: (R, N, D).
            modulation: (S, R, 3U, D): shift, scale and gate of each unit.
            step: (1,) int64, the row of `modulation` to use.
        """
        rows = modulation.index_select(0, step).squeeze(0).chunk(MODULATIONS_PER_UNIT * len(self.bodies), dim=1)
        results = []
        for index, (norm, body) in enumerate(zip(self.norms, self.bodies, strict=True)):
            shift, scale, gate = rows[MODULATIONS_PER_UNIT * index : MODULATIONS_PER_UNIT * (index + 1)]
            result = body(norm(tokens) * (1 + scale) + shift)
            tokens = tokens + gate * result
            results.append(result)
        return (tokens, *results) if self.returns_units else (tokens,)


class HeadPart(nn.Module):
    """Final layer, unpatchify, guidance and the sampler's update."""

    def __init__(self, model: DiTTransformer2DModel) -> None:
        super().__init__()
        self.norm_out = model.norm_out
        self.proj_out = model.proj_out_2
        self.patch = model.config.patch_size
        self.grid = model.config.sample_size // model.config.patch_size
        self.out_channels = model.out_channels
        self.channels = model.config.in_channels

    def forward(
        self,
        tokens: Tensor,
        modulation: Tensor,
        step: Tensor,
        latents: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        noise: Tensor,
        carried: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the next latents, the guided model output and what the next step is given, (B, C, H, W) float32 each.

        Args:
            tokens: (R, N, D).
            modulation: (S, R, 2, D): shift, scale.
            step: (1,) int64, the row of `modulation` and `coefficients` to use.
            latents: (B, C, H, W) float32.
            guidance: (K, B) float32, weights of the branches.
            coefficients: (S, 8) float32, a sampler's table.
            noise: (B, C, H, W) float32.
            carried: (B, C, H, W) float32, from the step before.
        """
        shift, scale = modulation.index_select(0, step).squeeze(0).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        output = self._unpatchify(patches).float().reshape(*guidance.shape, self.out_channels, *latents.shape[2:])
        guided = (guidance[:, :, None, None, None] * output[:, :, : self.channels]).sum(dim=0)
        # The variance is that of the conditional rows, which come first.
        variance = output[0, :, self.channels :] if self.out_channels > self.channels else None
        row = coefficients.index_select(0, step)
        latents_out, carried_out = sampler_update(row, latents, guided, noise, carried, variance)
        return latents_out, guided, carried_out

    def _unpatchify(self, patches: Tensor) -> Tensor:
        grid, patch, side = self.grid, self.patch, self.grid * self.patch
        pixels = patches.reshape(-1, grid, grid, patch, patch, self.out_channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side, side)


class StepPart(nn.Module):
    """The chain embed, blocks, head as one module: what the separate parts are measured against."""

    def __init__(self, model: DiTTransformer2DModel, parts: Sequence[Sequence[Unit]]) -> None:
        super().__init__()
        self.embed = EmbedPart(model)
        self.blocks = nn.ModuleList([UnitsPart(units, returns_units=False) for units in parts])
        self.head = HeadPart(model)

    def forward(
        self,
        latents: Tensor,
        branches: Tensor,
        step: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        noise: Tensor,
        carried: Tensor,
        **modulations: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the next latents, the guided model output and what is carried; arguments as those of the parts."""
        (tokens,) = self.embed(latents, branches)
        for index, part in enumerate(self.blocks):
            (tokens,) = part(tokens, modulations[f"modulation_{index:02d}"], step)
        outputs: tuple[Tensor, ...] = self.head(
            tokens, modulations["modulation_head"], step, latents, guidance, coefficients, noise, carried
        )
        return outputs


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
