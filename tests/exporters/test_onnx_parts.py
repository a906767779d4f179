"""Invariant: what is written is deterministic, self-contained, keeps every weight once, and follows the contract."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.numpy import load_file

from adacorr_deploy.core.errors import OutputError, UnsupportedModelError
from adacorr_deploy.core.specs import HALVES, DType, TensorSpec
from adacorr_deploy.exporters import export_parts
from tests.exporters.conftest import Exported, loaded, random_dit

Export = Callable[[DType, int], Exported]
PARTS = ["embed", "condition", "block_00", "block_01", "block_02", "head"]
PRECISIONS = [DType.FLOAT32, DType.FLOAT16]


def graph_of(parts: Exported, name: str) -> onnx.ModelProto:
    return onnx.load(str(parts.folder / f"{name}.onnx"), load_external_data=False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_file_passes_the_checker(precision: DType, exported: Export) -> None:
    parts = exported(precision, 1)
    assert list(parts.specs)[: len(PARTS)] == PARTS
    for name in parts.specs:
        onnx.checker.check_model(str(parts.folder / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize(
    ("precision", "segment"), [(DType.FLOAT32, HALVES), (DType.FLOAT32, 1), (DType.FLOAT32, 2), (DType.FLOAT16, 1)]
)
def test_inputs_and_outputs_carry_the_contracts_names_types_and_axes(
    precision: DType, segment: int, exported: Export
) -> None:
    parts = exported(precision, segment)
    for name, spec in parts.specs.items():
        graph = graph_of(parts, name).graph
        assert [_spec(value) for value in graph.input] == list(spec.inputs)
        assert [_spec(value) for value in graph.output] == list(spec.outputs)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    dtype = DType.from_numpy(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_stored_once(precision: DType, dit: DiTTransformer2DModel, exported: Export) -> None:
    """All of the model's weights, one embedder for all blocks, the position table: and nothing else."""
    parts = exported(precision, 1)
    stored = sum(tensor.size for name in PARTS for tensor in load_file(parts.folder / f"{name}.safetensors").values())
    embedder = sum(weight.numel() for weight in dit.transformer_blocks[0].norm1.emb.parameters())
    total = sum(weight.numel() for weight in dit.parameters()) + dit.pos_embed.pos_embed.numel()
    assert stored == total - 2 * embedder
    inline = [len(tensor.raw_data) for name in PARTS for tensor in graph_of(parts, name).graph.initializer]
    assert max(inline) <= 512  # the sinusoid's frequencies; no weight


def test_external_data_are_the_safetensors_own_tensors(exported: Export) -> None:
    parts = exported(DType.FLOAT32, 1)
    for name in PARTS:
        weights = load_file(parts.folder / f"{name}.safetensors")
        model = onnx.load(str(parts.folder / f"{name}.onnx"))
        named = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert weights.keys() <= named.keys()
        for key, value in weights.items():
            np.testing.assert_array_equal(named[key], value)


def test_no_weight_is_rearranged_at_run_time(exported: Export) -> None:
    parts = exported(DType.FLOAT32, 1)
    for name in PARTS:
        graph = graph_of(parts, name).graph
        weights = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
        movers = [
            node.op_type
            for node in graph.node
            if node.op_type in {"Transpose", "Concat", "Cast"} and weights & set(node.input)
        ]
        assert movers == []
    of_weights = [node for node in graph_of(parts, "block_00").graph.node if node.op_type == "MatMul"]
    assert len(of_weights) == 6  # query-key-value together, scores, mix, output, and two of the MLP


def test_the_wire_says_nothing_of_this_machine(exported: Export) -> None:
    parts = exported(DType.FLOAT32, 1)
    for name in parts.specs:
        content = (parts.folder / f"{name}.onnx").read_bytes()
        model = graph_of(parts, name)
        assert str(Path(__file__).parents[2]).encode() not in content
        assert b"site-packages" not in content
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert not model.metadata_props


def test_exporting_twice_gives_equal_files(tmp_path: Path, dit: DiTTransformer2DModel, exported: Export) -> None:
    first = exported(DType.FLOAT32, 1)
    export_parts(loaded(dit), tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (first.folder / file.name).read_bytes(), file.name


def test_blocks_of_one_structure_differ_in_their_weights_alone(exported: Export) -> None:
    parts = exported(DType.FLOAT32, 2)
    assert [len(parts.specs[name].outputs) for name in ("block_00", "block_01")] == [5, 3]
    single = exported(DType.FLOAT32, 1)
    graphs = [graph_of(single, name).graph.node for name in ("block_00", "block_01")]
    assert list(graphs[0]) == list(graphs[1])
    weights = [load_file(single.folder / f"{name}.safetensors") for name in ("block_00", "block_01")]
    assert weights[0].keys() == weights[1].keys()
    assert not any(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_progress_tells_each_part_and_what_it_raises_stops_the_export(
    tmp_path: Path, dit: DiTTransformer2DModel
) -> None:
    told: list[tuple[str, int, int]] = []

    def interrupt(part: str, done: int, total: int) -> None:
        told.append((part, done, total))
        if part == "condition":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_parts(loaded(dit), tmp_path, progress=interrupt)
    assert told == [("embed", 0, 6), ("condition", 1, 6)]
    assert {file.stem for file in tmp_path.iterdir()} == {"embed"}


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    model = random_dit()
    torch.nn.init.constant_(model.pos_embed.proj.bias, 1e5)
    with pytest.raises(UnsupportedModelError, match=r"embed: pos_embed\.proj\.bias overflows float16"):
        export_parts(loaded(model), tmp_path, DType.FLOAT16)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path, dit: DiTTransformer2DModel) -> None:
    with pytest.raises(OutputError, match="can't be written"):
        export_parts(loaded(dit), tmp_path / "missing")
