"""Counted operations are those of the paper's formulas, from real exported parts, and only for what was launched."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, parser

from adacorr_deploy.quality.flops import flops_of_graph

SIZES = {"batch": 3, "rows": 6}


def product(kind: str, **attributes: int | list[int]) -> onnx.NodeProto:
    node = helper.make_node(kind, ["a", "b"], ["y"])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def graph(path: Path, node: onnx.NodeProto, **shapes: tuple[int | str, ...]) -> Path:
    """Save a graph of one node; the last of the named tensors is its output."""
    *inputs, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    model = helper.make_model(helper.make_graph([node], "one", inputs, [output]))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("node", "shapes", "expected"),
    [
        (product("MatMul"), {"a": ("rows", 5, 7), "b": (7, 11), "y": ("rows", 5, 11)}, 2 * 6 * 5 * 7 * 11),
        (product("MatMul"), {"a": ("rows", 5, 7), "b": ("rows", 7, 5), "y": ("rows", 5, 5)}, 2 * 6 * 5 * 5 * 7),
        (product("Gemm", transB=1), {"a": ("batch", 7), "b": (11, 7), "y": ("batch", 11)}, 2 * 3 * 7 * 11),
        (product("Gemm", transA=1), {"a": (7, 4), "b": (7, 11), "y": (4, 11)}, 2 * 4 * 7 * 11),
        (
            product("Conv", kernel_shape=[2, 2], strides=[2, 2]),
            {"a": ("batch", 4, 8, 8), "b": (16, 4, 2, 2), "y": ("batch", 16, 4, 4)},
            2 * 3 * 16 * 4 * 4 * (4 * 2 * 2),
        ),
        (product("Add"), {"a": ("batch", 4), "b": ("batch", 4), "y": ("batch", 4)}, 0),
        (product("MatMul"), {"a": ("unheard-of", 7), "b": (7, 11), "y": ("unheard-of", 11)}, None),
    ],
)  # fmt: skip
def test_a_product_counts_two_operations_for_each_multiply_add(
    tmp_path: Path, node: onnx.NodeProto, shapes: dict[str, tuple[int | str, ...]], expected: int | None
) -> None:
    assert flops_of_graph(graph(tmp_path / "one.onnx", node, **shapes), SIZES) == expected


def test_attention_counts_scores_and_their_product_with_the_values(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    shape = ("rows", 4, 9, 16)
    model = helper.make_model(
        helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkv"],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
    )
    onnx.save(model, tmp_path / "one.onnx")
    assert flops_of_graph(tmp_path / "one.onnx", SIZES) == 2 * (2 * 6 * 4 * 9 * 9 * 16)


def test_what_is_no_graph_has_no_count(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"condition")
    assert flops_of_graph(tmp_path / "no.onnx", SIZES) is None


def test_a_size_is_followed_through_a_division(tmp_path: Path) -> None:
    """Models of clips part tokens from frames so: (rows, 12, 7) becomes (2 · rows, 6, 7) by the sizes themselves."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
        clips (float[rows, 12, 7] a, float[7, 11] b) => (float[pieces, tokens, 11] y) {
            shape = Shape (a)
            one = Constant <value_ints = [1]> ()
            two = Constant <value_ints = [2]> ()
            width = Constant <value_ints = [7]> ()
            rest = Constant <value_ints = [-1]> ()
            length = Gather <axis = 0> (shape, one)
            half = Div (length, two)
            parted = Concat <axis = 0> (rest, half, width)
            x = Reshape (a, parted)
            y = MatMul (x, b)
        }"""
    )
    onnx.save(model, tmp_path / "clips.onnx")
    assert flops_of_graph(tmp_path / "clips.onnx", SIZES) == 2 * (2 * 6) * 6 * 7 * 11
