"""What of the TensorRT plugins can be held without TensorRT: names, signatures, types, launches, and never on RTX."""

from __future__ import annotations

import inspect
import typing
from types import ModuleType

import pytest

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.plugins.onnx_service_parts import service_parts
from adacorr_deploy.plugins.tensorrt_op import NAMESPACE, PLUGINS, register_plugins
from tests.plugins.fake_tensorrt import DataType, FakeTensorRT, Registered, TensorDesc, install
from tests.plugins.service_models import model_spec

PTX = b".version 9.0"
TYPES = {DType.FLOAT32: DataType.FLOAT, DType.FLOAT16: DataType.HALF, DType.BFLOAT16: DataType.BF16}
PARTS = {"AdaCorrSignals": "signals", "AdaCorrPredict": "predict_2", "AdaCorrBlend": "blend_2"}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    installed = install(monkeypatch)
    register_plugins(installed.module, PTX)
    return installed


def registered(fake: FakeTensorRT, name: str) -> Registered:
    return fake.plugins[f"{NAMESPACE}::{name}"]


def described(name: str, precision: DType = DType.FLOAT16) -> list[TensorDesc]:
    """Return the inputs of a part at DiT-XL's size as TensorRT would describe them: rows and steps unknown."""
    model = model_spec(tokens=256, width=1152, units=(2,), precision=precision)
    spec, _ = service_parts(model)[PARTS[name]]
    types = {**TYPES, DType.INT64: DataType.INT64}
    return [TensorDesc([-1 if isinstance(d, str) else d for d in t.shape], types[t.dtype]) for t in spec.inputs]


def test_a_plugin_is_registered_for_each_node_that_asks_for_one(fake: FakeTensorRT) -> None:
    nodes = [proto.graph.node[0] for _, proto in service_parts(model_spec()).values() if proto.functions]
    assert {f"{NAMESPACE}::{node.op_type}" for node in nodes} == set(fake.plugins)
    assert "." not in NAMESPACE
    for node in nodes:
        assert tuple(node.input) == PLUGINS[node.op_type].inputs
        assert tuple(node.output) == PLUGINS[node.op_type].outputs, "a scratch comes after the node's own outputs"


@pytest.mark.parametrize("name", PLUGINS)
def test_signatures_are_those_that_tensorrt_reads(fake: FakeTensorRT, name: str) -> None:
    functions, kernel = registered(fake, name), PLUGINS[name]
    assert functions.autotune is not None and functions.aot_impl is not None
    register = inspect.signature(functions.register)
    assert tuple(register.parameters) == kernel.inputs
    assert {parameter.annotation for parameter in register.parameters.values()} == {TensorDesc}
    assert typing.get_origin(register.return_annotation) is tuple
    assert len(typing.get_args(register.return_annotation)) == len(kernel.outputs) + bool(kernel.scratch)
    assert tuple(inspect.signature(functions.autotune).parameters) == (*kernel.inputs, "outputs")
    launch = inspect.signature(functions.aot_impl)
    assert tuple(launch.parameters) == (*kernel.inputs, "outputs", "tactic")
    assert len(typing.get_args(launch.return_annotation)) == 4


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("precision", TYPES)
def test_types_of_inputs_and_outputs_are_the_part_s_own(fake: FakeTensorRT, name: str, precision: DType) -> None:
    inputs = described(name, precision)
    outputs = registered(fake, name).register(*inputs)
    autotune = registered(fake, name).autotune
    assert autotune is not None
    (combination,) = autotune(*inputs, outputs)
    choices = [types.strip().split("|") for types in combination.io_types.split(",")]
    which = list(TYPES).index(precision)
    found = [types[which if len(types) > 1 else 0] for types in choices]
    assert found == [tensor.dtype.value for tensor in (*inputs, *outputs)]


@pytest.mark.parametrize("precision", TYPES)
def test_outputs_have_the_shapes_of_the_part(fake: FakeTensorRT, precision: DType) -> None:
    for name, shapes in {
        "AdaCorrSignals": [(-1, 9), (-1, 257, 8)],
        "AdaCorrPredict": [(-1, 256, 1152)],
        "AdaCorrBlend": [(-1, 256, 1152), (-1,)],
    }.items():
        outputs = registered(fake, name).register(*described(name, precision))
        assert [tuple(output.shape) for output in outputs] == shapes


@pytest.mark.parametrize("precision", TYPES)
def test_launches_cover_the_tensors_with_the_rows_left_open(fake: FakeTensorRT, precision: DType) -> None:
    wide = 288 if precision is DType.FLOAT32 else 144
    for name, (kernel, grid_x, block_x, integers) in {
        "AdaCorrSignals": ("signals", 1, 1024, [256, 1152]),
        "AdaCorrPredict": ("predict", wide, 128, [256, 1152, 2, 2]),
        "AdaCorrBlend": ("blend", wide, 128, [256, 1152, 2, 2]),
    }.items():
        functions, inputs = registered(fake, name), described(name, precision)
        assert functions.aot_impl is not None
        entry, ptx, launch, extra = functions.aot_impl(*inputs, functions.register(*inputs), 0)
        assert (entry, ptx) == (f"adacorr_{kernel}_{precision.value}", PTX)
        assert (launch.grid_x, launch.grid_y, launch.block_x) == (grid_x, -1, block_x)
        assert (launch.grid_z, launch.block_y, launch.block_z, launch.shared_mem) == (1, 1, 1, 0)
        assert [each.value for each in extra] == integers


def test_registering_again_changes_nothing(fake: FakeTensorRT) -> None:
    before = dict(fake.plugins)
    register_plugins(fake.module, b"other")
    assert fake.plugins == before


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt_dispatch"])
def test_nothing_is_ever_registered_with_another_module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rtx = install(monkeypatch, name)
    with pytest.raises(EngineError, match=f"{name} takes no plugins: parsing one aborts the process"):
        register_plugins(rtx.module, PTX)
    assert not rtx.plugins


def test_the_module_itself_is_asked_not_what_else_is_installed(fake: FakeTensorRT) -> None:
    before = dict(fake.plugins)
    with pytest.raises(EngineError, match="takes no plugins"):
        register_plugins(ModuleType("tensorrt_rtx"), PTX)
    assert fake.plugins == before
