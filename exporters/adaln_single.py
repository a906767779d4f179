"""adaLN-single (arXiv 2310.00426, §2.3): one modulation for all blocks, to which each adds a table of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
