"""The service parts' names and specs follow the model, and agree with the ONNX files made from them."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest

from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.plugins import blend_part_name, common_unit_count, predict_part_name, service_part_specs
from adacorr_deploy.plugins.onnx_functions import DOMAIN
from adacorr_deploy.plugins.onnx_service_parts import service_parts
from tests.plugins.service_models import PRECISIONS, model_spec

ELEMENT_TYPES = {
    DType.FLOAT32: onnx.TensorProto.FLOAT,
    DType.FLOAT16: onnx.TensorProto.FLOAT16,
    DType.INT64: onnx.TensorProto.INT64,
}


def tensors_of(graph: onnx.GraphProto) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in (*graph.input, *graph.output)
    }


def expected_tensors(spec: PartSpec) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    return {tensor.name: (ELEMENT_TYPES[tensor.dtype], tensor.shape) for tensor in (*spec.inputs, *spec.outputs)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_onnx_part_is_valid_and_has_the_tensors_of_its_spec(precision: DType) -> None:
    model = model_spec(units=(4, 4, 1), precision=precision)
    parts = service_parts(model)
    assert {name: spec for name, (spec, _) in parts.items()} == service_part_specs(model)
    for spec, proto in parts.values():
        onnx.checker.check_model(proto, full_check=True)
        assert tensors_of(proto.graph) == expected_tensors(spec)


def test_each_part_is_one_node_of_our_domain_that_asks_for_a_plugin() -> None:
    parts = service_parts(model_spec())
    of_the_op = [name for name in parts if name.startswith(("signals", "predict", "blend"))]
    assert len(of_the_op) == 1 + 2 * 3
    for _, proto in (parts[name] for name in of_the_op):
        (node,) = proto.graph.node
        (function,) = proto.functions
        assert (node.domain, node.op_type) == (function.domain, function.name) == (DOMAIN, function.name)
        assert "plugin_namespace" in {attribute.name for attribute in node.attribute}
        assert {inner.domain for inner in function.node} == {""}, "a body of standard ops only"


def test_only_block_parts_of_an_uncommon_size_carry_their_size_in_the_name() -> None:
    model = model_spec(units=(8, 8, 8, 2))
    assert common_unit_count(model) == 8
    assert predict_part_name(model, units=8, evaluations=2) == "predict_2"
    assert predict_part_name(model, units=2, evaluations=2) == "predict_2_u2"
    assert blend_part_name(model, units=2, evaluations=3) == "blend_3_u2"
    specs = service_part_specs(model)
    assert len(specs) == 1 + 2 * (2 * 3 + 2) + 3 + 3 + 1  # of two sizes: predict, blend, modulated and probe
    for name, units in {"predict_2": 8, "predict_2_u2": 2}.items():
        (history,) = (tensor for tensor in specs[name].inputs if tensor.name == "history")
        assert history.shape[:2] == (2, units)


def test_specs_and_oracle_load_without_onnx() -> None:
    code = "import sys, adacorr_deploy.plugins, adacorr_deploy.plugins.oracle; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
