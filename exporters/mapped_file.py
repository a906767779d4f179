"""Safetensors mapped into memory: pages are read when they are used, and given back as soon as they are done with."""

from __future__ import annotations

import json
import mmap
import weakref
from pathlib import Path
from typing import Final, TypedDict

import torch
from torch import Tensor


class _Entry(TypedDict):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]  # first byte, and the one after the last, from the end of the header


_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_mappings: Final[weakref.WeakSet[mmap.mmap]] = weakref.WeakSet()  # of files whose tensors somebody holds


def tensors_from_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file whose header the safetensors library has checked; nothing is read yet.

    They must never be written to: `release_pages` would forget it.

    Raises:
        OSError: If the file can't be read, or holds a type that PyTorch has not.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    _mappings.add(mapping)
    entries: dict[str, _Entry] = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if unknown := sorted({entry["dtype"] for entry in entries.values()} - _DTYPES.keys()):
        raise OSError(f"it holds numbers of type {unknown[0]}")
    return {name: _tensor(mapping, entry, start=8 + length) for name, entry in entries.items()}


def release_pages() -> None:
    """Give the pages of mapped files back to the system. Whoever reads them again gets the same numbers.

    A build checks and copies every weight once; without this, all of a checkpoint would stay resident until its end.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        for mapping in list(_mappings):
            mapping.madvise(mmap.MADV_DONTNEED)


def _tensor(mapping: mmap.mmap, entry: _Entry, *, start: int) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    if not shape.numel():
        return torch.empty(shape, dtype=dtype)
    first = start + entry["data_offsets"][0]
    return torch.frombuffer(mapping, dtype=dtype, count=shape.numel(), offset=first).reshape(shape)
