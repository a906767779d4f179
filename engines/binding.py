"""What every backend checks before it hands addresses to an engine, which would read or write past them unasked."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import PartSpec, TensorSpec
from adacorr_deploy.engines.backend import Buffer


def check_binding(spec: PartSpec, buffers: Mapping[str, Buffer]) -> dict[str, int]:
    """Return the sizes of a part's named axes, as the buffers have them.

    Raises:
        EngineError: If a tensor is missing or unknown, a dtype or shape doesn't fit, a named axis has two sizes, or an
            output shares memory with another tensor.
    """
    _check_names(spec, buffers)
    sizes: dict[str, int] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        _check_tensor(spec, tensor, buffers[tensor.name], sizes)
    _check_overlaps(spec, buffers)
    return sizes


def _check_names(spec: PartSpec, buffers: Mapping[str, Buffer]) -> None:
    expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    missing, unknown = sorted(expected - buffers.keys()), sorted(buffers.keys() - expected)
    if missing or unknown:
        problems = [f"no buffer for {', '.join(missing)}"] if missing else []
        problems += [f"no tensor called {', '.join(unknown)}"] if unknown else []
        raise EngineError(f"{spec.name}: {'; '.join(problems)}. Its tensors are {', '.join(sorted(expected))}.")


def _check_tensor(spec: PartSpec, tensor: TensorSpec, buffer: Buffer, sizes: dict[str, int]) -> None:
    where = f"{spec.name}, tensor {tensor.name}"
    wanted = f"({', '.join(map(str, tensor.shape))})"
    if buffer.dtype is not tensor.dtype:
        raise EngineError(f"{where}: the buffer holds {buffer.dtype.value}, the engine takes {tensor.dtype.value}.")
    if len(buffer.shape) != len(tensor.shape):
        raise EngineError(f"{where}: the buffer's shape is {buffer.shape}, the engine takes {wanted}.")
    for dim, size in zip(tensor.shape, buffer.shape, strict=True):
        expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        if size != expected:
            cause = f"; {dim} is {expected} in the tensors before it" if isinstance(dim, str) else ""
            raise EngineError(f"{where}: the buffer's shape is {buffer.shape}, the engine takes {wanted}{cause}.")


def _check_overlaps(spec: PartSpec, buffers: Mapping[str, Buffer]) -> None:
    for output in spec.outputs:
        for name, other in buffers.items():
            if name != output.name and _overlap(buffers[output.name], other):
                raise EngineError(
                    f"{spec.name}: output {output.name} shares memory with {name}, so the engine could overwrite what "
                    "it still reads. Give it a buffer of its own (two in turn suffice for a chain)."
                )


def _overlap(one: Buffer, other: Buffer) -> bool:
    return one.address < other.address + _size_bytes(other) and other.address < one.address + _size_bytes(one)


def _size_bytes(buffer: Buffer) -> int:
    return math.prod(buffer.shape) * buffer.dtype.numpy.itemsize
