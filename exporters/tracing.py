"""Tracing a part to ONNX with its weights as inputs, so that parts of one structure are traced once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.shapes import (
    BATCH,
    BRANCHES,
    CHUNK,
    FRAMES,
    HEIGHT,
    ROWS,
    STEPS,
    TILE_HEIGHT,
    TILE_WIDTH,
    WIDTH,
)
from adacorr_deploy.core.specs import DType, PartSpec, TensorSpec
from adacorr_deploy.exporters.fold_weight_layout_pass import FoldWeightLayoutPass
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.weight_recipe import WeightRecipe
from adacorr_deploy.exporters.weights_file import TORCH_TYPES

OPSET: Final = 20  # the first with Gelu; ONNX Runtime and TensorRT both take it

# Sizes of the example inputs: all different and none 0 or 1, which tracing would take for constants.
_EXAMPLE_SIZES: Final = {BATCH: 3, BRANCHES: 2, ROWS: 6, STEPS: 5, CHUNK: 9, TILE_HEIGHT: 11, TILE_WIDTH: 13}
_EXAMPLE_PATCHES: Final = {FRAMES: 4, HEIGHT: 7, WIDTH: 8}
ONNX_TYPES: Final[Mapping[DType, ir.DataType]] = {
    DType.FLOAT32: ir.DataType.FLOAT,
    DType.FLOAT16: ir.DataType.FLOAT16,
    DType.BFLOAT16: ir.DataType.BFLOAT16,
    DType.INT64: ir.DataType.INT64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedPart:
    """A part's graph, whose weights are inputs by the names of `recipes`."""

    graph: onnx.ModelProto
    recipes: Mapping[str, WeightRecipe]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a part, by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def trace_part(part: Part, precision: DType, latents: LatentSpec | None = None) -> TracedPart:
    """Trace a part in `precision`; no weight is read, only its shape.

    Args:
        part: The part.
        precision: Of its weights.
        latents: Of its model, if named axes of its contract depend on their size.
    """
    names = tuple(weights_of(part.module))
    program = _exported_program(part, precision, _EXAMPLE_SIZES | _example_sizes(latents))
    with _quiet_exporter():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[*names, *(spec.name for spec in part.spec.inputs)],
            output_names=[spec.name for spec in part.spec.outputs],
            opset_version=OPSET,
            verbose=False,
        )
    if exported is None:
        raise RuntimeError(f"{part.spec.name}: torch.onnx.export returned no program")
    model = exported.model
    fold = FoldWeightLayoutPass(names)
    ir.passes.Sequential(
        fold,
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)
    _apply_contract(model, part.spec)
    return TracedPart(graph=ir.to_proto(model), recipes=fold.recipes)


class _Functional(nn.Module):
    """A part as a function of its weights and inputs; the part is no submodule, so no weight of it is traced."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self._call = part.module, tuple(weights_of(part.module)), tuple(spec.name for spec in part.spec.inputs)

    def forward(self, weights: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        module, weight_names, input_names = self._call
        named = dict(zip(weight_names, weights, strict=True))
        outputs: tuple[Tensor, ...] = torch.func.functional_call(
            module, named, (), dict(zip(input_names, inputs, strict=True))
        )
        return outputs


def _example_sizes(latents: LatentSpec | None) -> dict[str, int]:
    if latents is None:
        return {}
    patches = dict(zip(latents.axes, latents.patch, strict=True))
    sizes = zip(latents.axes, latents.shape[1:], strict=True)
    varying = latents.varying
    return latents.sizes_at(
        tuple(_EXAMPLE_PATCHES[name] * patches[name] if name in varying else size for name, size in sizes)
    )


def _exported_program(part: Part, precision: DType, sizes: Mapping[str, int]) -> torch.export.ExportedProgram:
    dtype = TORCH_TYPES[precision]
    weights = tuple(torch.empty(weight.shape, dtype=dtype) for weight in weights_of(part.module).values())
    inputs = tuple(torch.zeros(spec.resolved(sizes), dtype=TORCH_TYPES[spec.dtype]) for spec in part.spec.inputs)
    return torch.export.export(
        _Functional(part),
        (weights, inputs),
        dynamic_shapes=(tuple({} for _ in weights), tuple(_dynamic_axes(spec) for spec in part.spec.inputs)),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,  # rows = branches · batch is the runtime's promise
    )


def _dynamic_axes(spec: TensorSpec) -> dict[int, object]:
    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}


def _apply_contract(model: ir.Model, spec: PartSpec) -> None:
    """Give inputs and outputs the contract's types and axes, and drop what tells of this machine or of the tracer."""
    for value in (value for node in model.graph for value in node.outputs):
        value.shape, value.type = None, None
    given = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for tensor in (*spec.inputs, *spec.outputs):
        given[tensor.name].shape = ir.Shape(tensor.shape)
        given[tensor.name].type = ir.TensorType(ONNX_TYPES[tensor.dtype])
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "adacorr-deploy", None


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's remarks on packages that no part needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
