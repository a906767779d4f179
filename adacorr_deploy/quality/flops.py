"""How much arithmetic a run does: the products of its parts' ONNX graphs, times how often each part was launched.

Counted are matrix products, convolutions and attention, a multiply-add as two operations; whatever is element-wise
(norms, activations, gates, predictions of skipped blocks, the sampler's update) counts nothing. That is the usual FLOPs
of the literature, and it says so little of a memory-bound pass that wall-clock stands beside it in every table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS

if TYPE_CHECKING:
    import onnx

    from adacorr_deploy.runtime import Pipeline, SampleRequest

Shape = Sequence[int]


class FlopCounter:
    """Counts what a pipeline's parts compute, from their ONNX files; each graph is read once for each run size."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._names = ("embed", "condition", *pipeline.manifest.model.block_names, "head")
        self._of_part: dict[tuple[str, tuple[tuple[str, int], ...]], int | None] = {}

    def launches(self) -> Mapping[str, int]:
        """Return how often each part has been launched since the bundle was opened."""
        return {name: self._pipeline.session(name).launches for name in self._names}

    def since(self, before: Mapping[str, int], request: SampleRequest, *, steps: int) -> int | None:
        """Return the operations of everything launched since `before`, which was one request of so many steps.

        None where a graph can't be read, or holds a product whose size can't be told.
        """
        sizes = {
            BATCH: request.batch,
            BRANCHES: request.branches,
            ROWS: request.batch * request.branches,
            STEPS: steps,
            **self._pipeline.manifest.model.latents.sizes_at(request.size),
        }
        total = 0
        for name, count in self.launches().items():
            if (flops := self._flops(name, sizes)) is None:
                return None
            total += (count - before[name]) * flops
        return total

    def _flops(self, part: str, sizes: Mapping[str, int]) -> int | None:
        key = (part, tuple(sorted(sizes.items())))
        if key not in self._of_part:
            bundle = self._pipeline.bundle
            with suppress(ModuleNotFoundError):  # where nothing is built, ONNX's own package may be missing
                self._of_part[key] = flops_of_graph(bundle.file(bundle.manifest.parts[part].onnx), sizes)
        return self._of_part.setdefault(key, None)


def flops_of_graph(path: Path, sizes: Mapping[str, int]) -> int | None:
    """Return the operations of one launch of an ONNX graph; None if it is none, or a product in it has no known size.

    Args:
        path: The ONNX file; of weights outside it only the smallest are read.
        sizes: Of the named axes of its inputs.
    """
    import onnx_ir as ir
    from google.protobuf.message import DecodeError
    from onnxscript.optimizer import fold_constants

    try:
        graph = ir.load(path)
    except DecodeError:
        return None
    for value in graph.graph.inputs:
        if value.shape is not None:
            dims = (dim if isinstance(dim, int) else sizes.get(dim.value or "", dim) for dim in value.shape)
            value.shape = ir.Shape(dims)
    for value in graph.graph.outputs:  # what they say of named axes would contradict what follows from the inputs
        value.shape = None
    fold_constants(graph, onnx_shape_inference=True)  # onnx alone follows no size through a division, as of frames
    model = ir.to_proto(graph)
    shapes, total = _shapes(model), 0
    for node in model.graph.node:
        if (count := _PRODUCTS.get(node.op_type)) is None:
            continue
        try:
            total += count(node, [shapes[name] for name in node.input if name], shapes[node.output[0]])
        except KeyError:
            return None
    return total


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the shape of every tensor that has a known one."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _matrix_product(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * inputs[0][-1]


def _general_product(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(output) * inputs[0][0 if transposed else 1]


def _convolution(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(inputs[1][1:])  # the kernel's (channels of a group, height, width)


def _transposed_convolution(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _attention(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Count the scores and their product with the values; tokens stand in the last axis but one in both layouts."""
    query, key = inputs[0], inputs[1]
    return 2 * key[-2] * (math.prod(query) + math.prod(output))


_PRODUCTS: Final[Mapping[str, Callable[[onnx.NodeProto, Sequence[Shape], Shape], int]]] = {
    "MatMul": _matrix_product,
    "Gemm": _general_product,
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "Attention": _attention,
}
