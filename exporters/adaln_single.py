"""adaLN-single (arXiv 2310.00426, §2.3): one modulation for all blocks, to which each adds a table of its own.

The families that have it look at prompts by cross-attention: what that is given stands here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.shapes import ROWS
from adacorr_deploy.core.specs import DType, TensorSpec

if TYPE_CHECKING:
    from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel
    from diffusers.models.attention import BasicTransformerBlock

CONTEXT: Final = ("context", "context_bias")  # what cross-attention is given
MASKED: Final = -1e4  # added to the scores of a prompt's padding, as in diffusers: far below any score, and a float16
_TABLE_ROWS: Final = 6  # shift, scale, gate of the self-attention, then of the MLP


class AdaLNSingle(nn.Module):
    """Conditions and prompts to the modulation of all steps, and the context of cross-attention."""

    def __init__(
        self,
        *,
        linear: nn.Linear,
        tables: Sequence[nn.Parameter],
        units: Sequence[Sequence[str]],
        head_table: nn.Parameter,
        projection: nn.Module,
    ) -> None:
        """Take a model's own.

        Args:
            linear: Condition → shift, scale and gate of the self-attention, then of the MLP.
            tables: (6, D) of each block, in the order in which they run.
            units: Names of each block's units.
            head_table: (2, D).
            projection: Of prompts.
        """
        super().__init__()
        self.linear = linear
        self.tables = nn.ParameterList(tables)
        self.units = units
        self.head_table = head_table
        self.projection = projection

    def outputs(self, condition: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        """Return what a condition part does, of the condition (S, R, D) and the prompts.

        It is (S, R, 3U, D) per block, (S, R, 2, D) of the head, the context (R, T, D) and its bias (R, T).
        """
        shared = self.linear(functional.silu(condition)).unflatten(-1, (_TABLE_ROWS, -1))
        of_blocks = [
            modulation_of_block(shared, table, units) for table, units in zip(self.tables, self.units, strict=True)
        ]
        head = condition[:, :, None] + self.head_table
        context = self.projection(prompt_embeddings.to(shared.dtype))
        return (*of_blocks, head, context, context_bias(prompt_mask, shared.dtype))


class AdaLNSingleCondition(AdaLNSingle):
    """Timesteps and prompts to what a condition part gives, by diffusers' embedders."""

    def __init__(
        self,
        model: PixArtTransformer2DModel | LatteTransformer3DModel,
        blocks: Sequence[BasicTransformerBlock],
        units: Sequence[Sequence[str]],
    ) -> None:
        """Take a model's embedders and tables.

        Args:
            model: Diffusers' own.
            blocks: Its transformer blocks, in the order in which they run.
            units: Names of each block's units.
        """
        super().__init__(
            linear=model.adaln_single.linear,
            tables=[block.scale_shift_table for block in blocks],
            units=units,
            head_table=model.scale_shift_table,
            projection=nn.Identity() if model.caption_projection is None else model.caption_projection,
        )
        self.embedder = model.adaln_single.emb

    def forward(self, timesteps: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        """Return `outputs`.

        Args:
            timesteps: (S,) float32, in training steps.
            prompt_embeddings: (R, T, E) float32.
            prompt_mask: (R, T) int64: 1 where the prompt is, 0 where it is padded.
        """
        return self.for_rows(self.of_timesteps(timesteps), prompt_embeddings, prompt_mask)

    def of_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the condition (S, 1, D) of timesteps (S,)."""
        return self.embedded(self.embedder.timestep_embedder, timesteps)[:, None]

    def for_rows(self, condition: Tensor, prompt_embeddings: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        """Return `outputs` of the condition (S, 1, D), the same for all rows."""
        return self.outputs(condition.expand(-1, prompt_embeddings.shape[0], -1), prompt_embeddings, prompt_mask)

    def embedded(self, embedder: nn.Module, values: Tensor) -> Tensor:
        """Return (M, …) of values (M,), embedded as timesteps are."""
        # The sinusoid stays float32: at timestep 999 a float16 phase would be off by half a radian.
        waves: Tensor = self.embedder.time_proj(values.float())
        result: Tensor = embedder(waves.to(self.linear.weight.dtype))
        return result


def modulation_of_block(shared: Tensor, table: Tensor, units: Sequence[str]) -> Tensor:
    """Return a block's modulation (…, 3U, D).

    Args:
        shared: (…, 6, D): shift, scale and gate of the self-attention, then of the MLP.
        table: (6, D), added to it.
        units: Names of the block's units; one that is neither a self-attention nor an MLP is not modulated and not
            gated.
    """
    attention, mlp = (shared + table).chunk(2, dim=-2)
    zero = torch.zeros_like(attention[..., :1, :])
    plain = torch.cat([zero, zero, zero + 1], dim=-2)
    rows = {"attention": attention, "temporal_attention": attention, "mlp": mlp}
    return torch.cat([rows.get(unit, plain) for unit in units], dim=-2)


def context_bias(prompt_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what the scores of cross-attention get added, (R, T), of a mask (R, T), 1 where a token is real."""
    return (1 - prompt_mask.to(dtype)) * MASKED


def context_specs(*, tokens: int, width: int, precision: DType) -> tuple[TensorSpec, ...]:
    """Return `FamilyModules.context` of prompts of so many tokens: what `CONTEXT` names."""
    context, bias = CONTEXT
    return (
        TensorSpec(name=context, dtype=precision, shape=(ROWS, tokens, width)),
        TensorSpec(name=bias, dtype=precision, shape=(ROWS, tokens)),
    )
