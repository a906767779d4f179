"""From a family's modules to parts: the same for every family, once it has said what its blocks are made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from adacorr_deploy.core.specs import ModelSpec, TensorSpec
from adacorr_deploy.exporters.contracts import Contracts
from adacorr_deploy.exporters.head import HeadPart
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.units import (
    Block,
    Unit,
    UnitsPart,
    inputs_of_units,
    modulation_of_parts,
    parts_of_blocks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyModules:
    """A model's modules, of which its parts are made; nothing is copied.

    Modules take and return tensors in the precision of their weights, but for what contracts say is float32 or int64.

    Attributes:
        embed: `forward(latents, branches, …)` returns a tuple of tokens (R, N, D); `repeated` makes rows of images.
        condition: Returns the modulation of each transformer block, (S, R, 3U, D), then of the head, (S, R, 2, D), then
            the tensors of `context`. What its `forward` takes, by name, is of `core.specs.request_tensors`.
        blocks: The units of each transformer block.
        head: See `HeadPart`.
        context: What `condition` returns beside the modulations, (R, …) each: inputs of units or of `embed`.
    """

    embed: nn.Module
    condition: nn.Module
    blocks: Sequence[Block]
    head: HeadPart
    context: tuple[TensorSpec, ...] = ()

    @property
    def block_units(self) -> tuple[tuple[str, ...], ...]:
        """`ModelSpec.blocks`."""
        return tuple(tuple(unit.name for unit in block) for block in self.blocks)


class ConditionPart(nn.Module):
    """A family's condition module, its blocks' modulations dealt to the block parts."""

    def __init__(self, condition: nn.Module, *, blocks: int, units: Sequence[int]) -> None:
        super().__init__()
        self.condition = condition
        self.blocks = blocks
        self.units = tuple(units)

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return (S, R, 3U, D) for each block part, (S, R, 2, D) for the head, and the context."""
        outputs = self.condition(**inputs)
        return (*modulation_of_parts(outputs[: self.blocks], self.units), *outputs[self.blocks :])


class StepPart(nn.Module):
    """The chain embed, blocks, head as one module: what the separate parts are measured against."""

    def __init__(self, modules: FamilyModules, parts: Sequence[Sequence[Unit]]) -> None:
        super().__init__()
        self.embed = modules.embed
        self.blocks = nn.ModuleList([UnitsPart(units, returns_units=False) for units in parts])
        self.inputs_of_blocks = [inputs_of_units(units) for units in parts]
        self.head = modules.head

    def forward(self, latents: Tensor, branches: Tensor, step: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the next latents, the guided model output and what is carried; arguments as those of the parts."""
        (tokens,) = self.embed(latents, branches, **{name: inputs[name] for name in _further_inputs(self.embed)})
        for index, (part, names) in enumerate(zip(self.blocks, self.inputs_of_blocks, strict=True)):
            named = {name: inputs[name] for name in names}
            (tokens,) = part(tokens, inputs[f"modulation_{index:02d}"], step, **named)
        update = {name: inputs[name] for name in ("guidance", "coefficients", "noise", "carried")}
        outputs: tuple[Tensor, ...] = self.head(tokens, inputs["modulation_head"], step, latents, **update)
        return outputs


def family_parts(modules: FamilyModules, spec: ModelSpec) -> Iterator[Part]:
    """Yield embed, condition, every block part and head."""
    contracts = Contracts(spec, modules.context)
    embed = contracts.embed(_further_inputs(modules.embed))
    yield Part(spec=embed, module=modules.embed.eval(), structure="embed")
    condition = ConditionPart(modules.condition, blocks=len(modules.blocks), units=spec.units)
    named = _parameters(modules.condition)
    yield Part(spec=contracts.condition(named), module=condition.eval(), structure="condition")
    for index, units in enumerate(parts_of_blocks(modules.blocks, spec.segment)):
        part_spec = contracts.block_part(index, inputs_of_units(units))
        structure = " ".join(spec.unit_names(index))
        yield Part(spec=part_spec, module=UnitsPart(units).eval(), structure=structure)
    yield Part(spec=contracts.head(), module=modules.head.eval(), structure="head")


def family_step_part(modules: FamilyModules, spec: ModelSpec) -> Part:
    """Return embed, blocks and head as one part, with the inputs of the chain and no units."""
    parts = parts_of_blocks(modules.blocks, spec.segment)
    of_units = inputs_of_units([unit for units in parts for unit in units])
    further = dict.fromkeys((*_further_inputs(modules.embed), *of_units))
    module = StepPart(modules, parts).eval()
    return Part(spec=Contracts(spec, modules.context).step(further), module=module, structure="step")


def repeated(tokens: Tensor, branches: Tensor) -> Tensor:
    """Return tokens (R, N, D) of those of the images, (B, N, D), once for each of `branches` (K,), which are ones."""
    rows = branches.to(tokens.dtype)[:, None, None, None] * tokens[None]
    return rows.reshape(-1, *tokens.shape[1:])


def _parameters(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _further_inputs(embed: nn.Module) -> tuple[str, ...]:
    return tuple(name for name in _parameters(embed) if name not in {"latents", "branches"})
