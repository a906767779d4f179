"""Writing a part's weights as safetensors, one tensor in memory at a time, for ONNX external data to point into."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.specs import DType

_PAGE_BYTES: Final = 4096  # the data start on a page, so that a runtime may map them
_SAFETENSORS_NAMES: Final[Mapping[DType, str]] = {
    DType.FLOAT32: "F32",
    DType.FLOAT16: "F16",
    DType.BFLOAT16: "BF16",
}
TORCH_TYPES: Final[Mapping[DType, torch.dtype]] = {
    DType.FLOAT32: torch.float32,
    DType.FLOAT16: torch.float16,
    DType.BFLOAT16: torch.bfloat16,
    DType.INT64: torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file
    length_bytes: int


def layout_of(shapes: Mapping[str, tuple[int, ...]], dtype: DType) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return a file's header and where each tensor lies, in the order given."""
    header: dict[str, object] = {}
    start = 0
    for name, shape in shapes.items():
        length = math.prod(shape) * dtype.numpy.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [start, start + length]}
        start += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _PAGE_BYTES)  # the format allows spaces after the header
    tensors, offset = {}, 8 + len(text)
    for name, shape in shapes.items():
        length = math.prod(shape) * dtype.numpy.itemsize
        tensors[name] = StoredTensor(shape=shape, offset_bytes=offset, length_bytes=length)
        offset += length
    return len(text).to_bytes(8, "little") + text, tensors


def write_weights(path: Path, header: bytes, tensors: Iterable[tuple[str, Tensor]], dtype: DType) -> None:
    """Write the tensors behind their header, one after the other.

    Raises:
        UnsupportedModelError: If a weight is too large for `dtype`.
        OSError: If the file can't be written.
    """
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in tensors:
            stored = tensor.to(TORCH_TYPES[dtype]).contiguous()
            if not torch.isfinite(stored).all():
                raise UnsupportedModelError(
                    f"{path.stem}: {name} overflows {dtype.value}. Build with --precision fp32."
                )
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)  # tofile would lose the reason of a full disk
