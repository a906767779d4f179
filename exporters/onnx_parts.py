"""ONNX files of a model's parts, each with its weights in a safetensors file beside it, stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from torch import Tensor, nn

from adacorr_deploy.core.errors import OutputError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.exporters.checkpoints import LoadedModel
from adacorr_deploy.exporters.mapped_file import release_pages
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.streamed_module import StreamedModule
from adacorr_deploy.exporters.tracing import ONNX_TYPES, TracedPart, trace_part, weights_of
from adacorr_deploy.exporters.weights_file import StoredTensor, layout_of, write_weights


def export_parts(
    loaded: LoadedModel,
    directory: Path,
    precision: DType = DType.FLOAT32,
    segment: int = 1,
    progress: Progress | None = None,
) -> dict[str, PartSpec]:
    """Write NAME.onnx and NAME.safetensors of every part into an existing folder.

    Args:
        loaded: The model.
        directory: Where to write; on an error or an interruption, what was written stays: use a temporary folder.
        precision: float32, float16 or bfloat16, of weights and of activations between parts.
        segment: Transformer blocks in a block part, or `HALVES`: each of their units is one.
        progress: Told before each part, and at the end. What it raises stops the export.

    Raises:
        UnsupportedModelError: If a weight overflows `precision`.
        OutputError: If a file can't be written.
    """
    model = loaded.model.spec(precision, segment)
    total = len(model.units) + 3
    specs: dict[str, PartSpec] = {}
    traced: dict[str, TracedPart] = {}
    for part in loaded.parts(precision, segment):
        if progress is not None:
            progress(part.spec.name, len(specs), total)
        if part.structure not in traced:
            traced[part.structure] = trace_part(part, precision, model.latents)
        _write_part(part, traced[part.structure], directory, precision)
        specs[part.spec.name] = part.spec
    if progress is not None:
        progress("", total, total)
    return specs


def export_part(part: Part, precision: DType, directory: Path, latents: LatentSpec | None = None) -> PartSpec:
    """Write NAME.onnx and NAME.safetensors of one part into an existing folder, and return its spec.

    Args:
        part: The part.
        precision: float32, float16 or bfloat16, of its weights.
        directory: Where to write.
        latents: Of its model, if named axes of its contract depend on their size.

    Raises:
        UnsupportedModelError: If a weight overflows `precision`.
        OutputError: If a file can't be written.
    """
    _write_part(part, trace_part(part, precision, latents), directory, precision)
    return part.spec


def monolithic_step_onnx(
    loaded: LoadedModel, directory: Path, precision: DType = DType.FLOAT32, segment: int = 1
) -> PartSpec:
    """Write step.onnx (and step.safetensors): the chain embed, blocks, head as one graph, for benchmarks.

    Its inputs are those of the chain (the modulations are made by the condition part, once a request) and its
    outputs the head's: the blocks' units, which caching needs, are left out.

    Raises:
        UnsupportedModelError: If a weight overflows `precision`.
        OutputError: If a file can't be written.
    """
    latents = loaded.model.spec(precision, segment).latents
    return export_part(loaded.step_part(precision, segment), precision, directory, latents)


def reference_modules(loaded: LoadedModel, segment: int = 1) -> dict[str, nn.Module]:
    """Return the parts as PyTorch modules that compute in float32 from the model's own weights.

    Each takes the tensors of its contract by name and returns a tuple of the outputs in the contract's order.
    """
    return {part.spec.name: StreamedModule(part.module) for part in loaded.parts(DType.FLOAT32, segment)}


def _write_part(part: Part, traced: TracedPart, directory: Path, precision: DType) -> None:
    name, weights = part.spec.name, weights_of(part.module)
    header, stored = layout_of(_stored_shapes(traced), precision)
    graph = _with_external_weights(traced.graph, stored, f"{name}.safetensors", precision)
    graph.graph.name = name
    try:
        write_weights(directory / f"{name}.safetensors", header, _computed(traced, stored, weights), precision)
        (directory / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    except OSError as error:
        raise OutputError(f"{directory} can't be written: {error}. Free some space or choose another.") from error


def _computed(
    traced: TracedPart, stored: Mapping[str, StoredTensor], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored weights, each made when it is asked for; what it was read from leaves memory after it."""
    for key in stored:
        yield key, traced.recipes[key].compute(weights)
        release_pages()


def _stored_shapes(traced: TracedPart) -> dict[str, tuple[int, ...]]:
    weights = (value for value in traced.graph.graph.input if value.name in traced.recipes)
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in weights}


def _with_external_weights(
    traced: onnx.ModelProto, stored: Mapping[str, StoredTensor], location: str, precision: DType
) -> onnx.ModelProto:
    """Return the graph with its weight inputs turned into initializers that lie in `location`."""
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, place in stored.items():
        tensor = model.graph.initializer.add(
            name=name,
            data_type=ONNX_TYPES[precision].value,
            dims=place.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        entries = {"location": location, "offset": place.offset_bytes, "length": place.length_bytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
    return model
