"""What every family's blocks are made of: units that add to the tokens, and the part that runs consecutive ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT, units_of_parts


@dataclass(frozen=True, slots=True)
class Unit:
    """What a transformer block adds to its tokens at a time: `gate · body(norm(tokens) · (1 + scale) + shift)`.

    Attributes:
        name: As in `ModelSpec.blocks`; blocks whose units have equal names must be equal but for their weights' values.
        norm: Of the tokens; `nn.Identity()` where there is none.
        body: Takes (R, N, D), and the tensors that `inputs` names as keyword arguments.
        inputs: What `body` needs besides: of what the condition part returns, or the runtime knows of a request.
    """

    name: str
    norm: nn.Module
    body: nn.Module
    inputs: tuple[str, ...] = ()


Block = Sequence[Unit]  # a transformer block


class UnitsPart(nn.Module):
    """Consecutive units, whole blocks or one unit, which also returns their results before their gates."""

    def __init__(self, units: Sequence[Unit], *, returns_units: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList([unit.norm for unit in units])
        self.bodies = nn.ModuleList([unit.body for unit in units])
        self.inputs_of_units = [unit.inputs for unit in units]
        self.returns_units = returns_units

    def forward(self, tokens: Tensor, modulation: Tensor, step: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the next tokens, and the units' results in order, each (R, N, D).

        Args:
            tokens: (R, N, D).
            modulation: (S, R, 3U, D): shift, scale and gate of each unit.
            step: (1,) int64, the row of `modulation` to use.
            inputs: What `inputs_of_units` names.
        """
        rows = modulation.index_select(0, step).squeeze(0).chunk(MODULATIONS_PER_UNIT * len(self.bodies), dim=1)
        results = []
        for index, (norm, body, names) in enumerate(zip(self.norms, self.bodies, self.inputs_of_units, strict=True)):
            shift, scale, gate = rows[MODULATIONS_PER_UNIT * index : MODULATIONS_PER_UNIT * (index + 1)]
            result = body(norm(tokens) * (1 + scale) + shift, **{name: inputs[name] for name in names})
            tokens = tokens + gate * result
            results.append(result)
        return (tokens, *results) if self.returns_units else (tokens,)


def inputs_of_units(units: Sequence[Unit]) -> tuple[str, ...]:
    """Return what units need beside tokens and modulation, each name once."""
    return tuple(dict.fromkeys(name for unit in units for name in unit.inputs))


def parts_of_blocks(blocks: Sequence[Block], segment: int) -> list[list[Unit]]:
    """Return the units of each block part, of so many transformer blocks (`core.specs.HALVES`: of one unit)."""
    units = iter([unit for block in blocks for unit in block])
    counts = units_of_parts([[unit.name for unit in block] for block in blocks], segment)
    return [[next(units) for _ in range(count)] for count in counts]


def modulation_of_parts(of_blocks: Sequence[Tensor], units: Sequence[int]) -> list[Tensor]:
    """Return (S, R, 3U, D) for each block part: the rows of its blocks joined, or a block's rows cut for its units.

    Args:
        of_blocks: (S, R, 3U, D) for each transformer block.
        units: In each block part, as `ModelSpec.units`.
    """
    if all(count == 1 for count in units):
        return [part for rows in of_blocks for part in rows.split(MODULATIONS_PER_UNIT, dim=2)]
    blocks, parts = list(of_blocks), []
    for count in units:
        taken = [blocks.pop(0)]
        while sum(rows.shape[2] for rows in taken) < MODULATIONS_PER_UNIT * count:
            taken.append(blocks.pop(0))
        parts.append(torch.cat(taken, dim=2))
    return parts
