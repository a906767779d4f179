"""Bundles that were altered together with their hashes: they open, and are wrong."""

from __future__ import annotations

import json

import numpy as np

from adacorr_deploy.core.bundle import Bundle, replace_file
from adacorr_deploy.core.manifest import MANIFEST_NAME, file_record
from adacorr_deploy.core.specs import DType


def scale_largest_weight(bundle: Bundle, part: str, factor: float) -> None:
    """Multiply a part's largest weight in place, where the ONNX file's external data point."""
    dtype = bundle.manifest.model.precision.numpy
    path = bundle.file(f"parts/{part}.safetensors")
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header: dict[str, dict[str, list[int]]] = json.loads(content[8:start])
    first, end = max((each["data_offsets"] for each in header.values()), key=lambda span: span[1] - span[0])
    count = (end - first) // dtype.itemsize
    weights = np.frombuffer(content, dtype, count=count, offset=start + first)
    weights[:] = weights.astype(DType.FLOAT32.numpy) * np.float32(factor)
    path.write_bytes(content)
    rehash(bundle, f"parts/{part}.safetensors")


def rehash(bundle: Bundle, relative: str) -> None:
    """Let the manifest vouch for an altered file."""
    files = {**bundle.manifest.files, relative: file_record(bundle.file(relative))}
    manifest = bundle.manifest.model_copy(update={"files": files})
    replace_file(bundle.path / MANIFEST_NAME, manifest.model_dump_json().encode())
