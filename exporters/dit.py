"""DiT as parts: embed, condition, blocks and head, made of diffusers' own submodules."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.specs import MODULATIONS_PER_BLOCK
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

    def __init__(self, model: DiTTransformer2DModel, segments: Sequence[int]) -> None:
        super().__init__()
        embedders = [block.norm1.emb for block in model.transformer_blocks]
        if embedders_agree(model):
            embedders = embedders[:1]
        self.embedders = nn.ModuleList(embedders)
        self.linears = nn.ModuleList([block.norm1.linear for block in model.transformer_blocks])
        self.segments = tuple(segments)  # blocks in each block part
        self.head_linear = model.proj_out_1

    def forward(self, timesteps: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """Return one (S, R, 6n, D) per block part, and (S, R, 2, D) for the head.

        Args:
            timesteps: (S,) float32, in training steps.
            labels: (R,) int64; the null label stands for rows without condition.
        """
        conditions = [self._condition(embedder, timesteps, labels) for embedder in self.embedders]
        of_blocks = conditions if len(conditions) > 1 else conditions * len(self.linears)
        rows = iter(
            linear(condition).unflatten(-1, (MODULATIONS_PER_BLOCK, -1))
            for linear, condition in zip(self.linears, of_blocks, strict=True)
        )
        outputs = [torch.cat(list(islice(rows, blocks)), dim=2) for blocks in self.segments]
        return (*outputs, self.head_linear(conditions[0]).unflatten(-1, (2, -1)))

    @staticmethod
    def _condition(embedder: CombinedTimestepLabelEmbeddings, timesteps: Tensor, labels: Tensor) -> Tensor:
        # The sinusoid stays float32: at timestep 999 a float16 phase would be off by half a radian.
        waves = embedder.time_proj(timesteps.float()).to(embedder.timestep_embedder.linear_1.weight.dtype)
        steps = embedder.timestep_embedder(waves)
        return functional.silu(steps[:, None] + embedder.class_embedder(labels)[None])


class BlocksPart(nn.Module):
    """Consecutive transformer blocks, which also return their attention and MLP results before the adaLN gates."""

    def __init__(self, blocks: Sequence[BasicTransformerBlock], *, units: bool = True) -> None:
        super().__init__()
        # Submodules one by one: the block's own embedder and adaLN projection belong to the condition part.
        self.norms_1 = nn.ModuleList([block.norm1.norm for block in blocks])
        self.attentions = nn.ModuleList([block.attn1 for block in blocks])
        self.norms_2 = nn.ModuleList([block.norm3 for block in blocks])
        self.mlps = nn.ModuleList([block.ff for block in blocks])
        self.units = units

    def forward(self, tokens: Tensor, modulation: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Return the next tokens, and the units attention_0, mlp_0, attention_1, …, each (R, N, D).

        Args:
            tokens: (R, N, D).
            modulation: (S, R, 6n, D).
            step: (1,) int64, the row of `modulation` to use.
        """
        rows = modulation.index_select(0, step).squeeze(0).chunk(MODULATIONS_PER_BLOCK * len(self.mlps), dim=1)
        units = []
        for index, (norm_1, attention, norm_2, mlp) in enumerate(
            zip(self.norms_1, self.attentions, self.norms_2, self.mlps, strict=True)
        ):
            first = MODULATIONS_PER_BLOCK * index
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows[first : first + MODULATIONS_PER_BLOCK]
            attended = _attend(attention, norm_1(tokens) * (1 + scale_a) + shift_a)
            tokens = tokens + gate_a * attended
            transformed = mlp(norm_2(tokens) * (1 + scale_m) + shift_m)
            tokens = tokens + gate_m * transformed
            units += [attended, transformed]
        return (tokens, *units) if self.units else (tokens,)


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

    def __init__(self, model: DiTTransformer2DModel, segments: Sequence[Sequence[BasicTransformerBlock]]) -> None:
        super().__init__()
        self.embed = EmbedPart(model)
        self.blocks = nn.ModuleList([BlocksPart(blocks, units=False) for blocks in segments])
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


def _attend(attention: Attention, x: Tensor) -> Tensor:
    result: Tensor = fused_self_attention(attention, x) if torch.compiler.is_exporting() else attention(x)
    return result
