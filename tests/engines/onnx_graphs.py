"""Tiny ONNX parts, written in ONNX's text syntax, and their specs."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import parser

from adacorr_deploy.core.shapes import Dim
from adacorr_deploy.core.specs import DType, PartSpec, TensorSpec

WIDTH = 4


def tensor(name: str, *shape: Dim, dtype: DType = DType.FLOAT32) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape or ("rows", WIDTH))


def part_spec(
    name: str = "part", inputs: tuple[TensorSpec, ...] = (), outputs: tuple[TensorSpec, ...] = ()
) -> PartSpec:
    return PartSpec(name=name, inputs=inputs or (tensor("x"),), outputs=outputs or (tensor("y"),))


def write_part(folder: Path, body: str, spec: PartSpec) -> Path:
    """Write a graph with the spec's float32 tensors around the nodes of `body`."""

    def infos(tensors: tuple[TensorSpec, ...]) -> str:
        return ", ".join(f"float[{', '.join(map(str, t.shape))}] {t.name}" for t in tensors)

    text = f'<ir_version: 10, opset_import: ["" : 20]> {spec.name} '
    model = parser.parse_model(f"{text} ({infos(spec.inputs)}) => ({infos(spec.outputs)}) {{ {body} }}")
    path = folder / f"{spec.name}.onnx"
    onnx.save(model, path)
    return path
