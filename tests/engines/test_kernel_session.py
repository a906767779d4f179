"""Service parts as kernels give what the NumPy oracle gives, are counted, and fit into graphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.kernel_session import KernelLibrary
from adacorr_deploy.plugins import oracle
from adacorr_deploy.plugins.kernel_compiler import compile_kernels
from adacorr_deploy.plugins.service_parts import (
    SIGNAL_COUNT,
    blend_spec,
    extrapolate_spec,
    output_error_spec,
    predict_spec,
    signals_spec,
)
from tests.engines.conftest import DriverCount
from tests.models import model_spec

pytestmark = pytest.mark.gpu

_SIZES = {"rows": 4, "batch": 2, "steps": 6}
_TOLERANCES = {DType.FLOAT32: 2e-6, DType.FLOAT16: 2e-3, DType.BFLOAT16: 1.6e-2}  # two units in the last place
_PRECISIONS = list(_TOLERANCES)

Arrays = dict[str, NDArray[np.generic]]


def _model(precision: DType, width: int = 24) -> ModelSpec:
    return model_spec(latent_shape=(4, 7, 3), patch=(1, 1), width=width, units=(4,), precision=precision)


@pytest.fixture
def library(device: Device) -> KernelLibrary:
    return KernelLibrary(device, compile_kernels())


def _inputs(spec: PartSpec, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    arrays: Arrays = {}
    for tensor in spec.inputs:
        shape = tensor.resolved(_SIZES)
        if tensor.dtype is DType.INT64:
            arrays[tensor.name] = random.integers(0, _SIZES["steps"], shape)
        else:
            arrays[tensor.name] = random.normal(size=shape).astype(np.float32).astype(tensor.dtype.numpy)
    return arrays


def _allocate(device: Device, spec: PartSpec, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, DeviceBuffer]:
    buffers = {}
    for tensor in (*spec.inputs, *spec.outputs):
        buffers[tensor.name] = device.allocate(tensor.resolved(_SIZES), tensor.dtype)
        if tensor.name in inputs:
            buffers[tensor.name].write(inputs[tensor.name])
    return buffers


def _run(library: KernelLibrary, spec: PartSpec, inputs: Arrays) -> dict[str, NDArray[np.float64]]:
    buffers = _allocate(library.device, spec, inputs)
    library.open(spec).bind(buffers).run()
    return {tensor.name: _read(buffers[tensor.name]) for tensor in spec.outputs}


def _read(buffer: DeviceBuffer) -> NDArray[np.float64]:
    return buffer.read().astype(np.float64)


def _wide(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    return {name: values.astype(np.float32) for name, values in arrays.items()}


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("width", [24, 25])
def test_signals(library: KernelLibrary, precision: DType, width: int) -> None:
    spec = signals_spec(_model(precision, width))
    inputs = _inputs(spec)
    found = _run(library, spec, inputs)["signals"]
    wide = _wide(inputs)
    np.testing.assert_allclose(found, oracle.signals(wide["tokens"], wide["reference"]), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("precision", _PRECISIONS)
@pytest.mark.parametrize("evaluations", [1, 3])
def test_predict(library: KernelLibrary, precision: DType, evaluations: int) -> None:
    spec = predict_spec(_model(precision), units=4, evaluations=evaluations)
    inputs = _inputs(spec)
    gate_steps = inputs["gate_steps"].astype(np.int64)
    wide = _wide(inputs)
    expected = oracle.predict(wide["tokens"], wide["history"], wide["modulation"], gate_steps, wide["coefficients"])
    tolerance = _TOLERANCES[precision]
    np.testing.assert_allclose(_run(library, spec, inputs)["tokens_out"], expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("precision", _PRECISIONS)
def test_blend(library: KernelLibrary, precision: DType) -> None:
    spec = blend_spec(_model(precision), units=4, evaluations=2)
    inputs = _inputs(spec)
    inputs["estimate"] = np.array([0.0, 0.15, 0.3, np.nan], dtype=np.float32)
    inputs["thresholds"] = np.array([0.1, 0.2, 1.0], dtype=np.float32)
    gate_steps = inputs["gate_steps"].astype(np.int64)
    wide = _wide(inputs)
    expected, weight = oracle.blend(
        wide["base"],
        wide["history"],
        wide["modulation"],
        gate_steps,
        wide["coefficients"],
        wide["fresh"],
        wide["estimate"],
        wide["thresholds"],
    )
    found = _run(library, spec, inputs)
    tolerance = _TOLERANCES[precision]
    np.testing.assert_allclose(found["weight"], weight, rtol=1e-5)
    np.testing.assert_allclose(found["tokens_out"], expected, rtol=tolerance, atol=10 * tolerance)


def test_extrapolate_and_its_error(library: KernelLibrary) -> None:
    model = _model(DType.BFLOAT16)
    spec = extrapolate_spec(model, evaluations=3)
    inputs = _inputs(spec)
    row = inputs["coefficients"][int(inputs["step"][0])].astype(np.float32)
    wide = _wide(inputs)
    named = {name: wide[name] for name in ("latents", "history", "factors", "noise", "carried")}
    results = oracle.extrapolate(**named, sampler_row=row)
    found = _run(library, spec, inputs)
    for name, wanted in zip(("latents_out", "model_output", "carried_out"), results, strict=True):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5)

    spec = output_error_spec(model)
    inputs = _inputs(spec)
    wide = _wide(inputs)
    expected = oracle.output_error(wide["predicted"], wide["fresh"])
    np.testing.assert_allclose(_run(library, spec, inputs)["error"], expected, rtol=1e-5)


def test_launches_follow_their_inputs_and_are_counted(library: KernelLibrary) -> None:
    device = library.device
    spec = signals_spec(_model(DType.FLOAT16))
    session = library.open(spec)
    bindings = [_allocate(device, spec, _inputs(spec, seed)) for seed in range(2)]
    launches = [session.bind(buffers) for buffers in bindings]
    for turn in range(3):
        for seed, (buffers, launch) in enumerate(zip(bindings, launches, strict=True)):
            inputs = _inputs(spec, 10 * turn + seed)
            buffers["tokens"].write(inputs["tokens"])
            launch.run()
            wide = _wide(inputs | {"reference": _inputs(spec, seed)["reference"]})
            expected = oracle.signals(wide["tokens"], wide["reference"])
            np.testing.assert_allclose(_read(buffers["signals"]), expected, rtol=2e-5, atol=2e-6)
    assert session.launches == 6


def test_a_chain_of_kernels_becomes_one_graph(library: KernelLibrary) -> None:
    device = library.device
    model = _model(DType.FLOAT32)
    predict, signals = predict_spec(model, units=4, evaluations=2), signals_spec(model)
    buffers = _allocate(device, predict, _inputs(predict))
    measured = {
        "tokens": buffers["tokens_out"],
        "reference": buffers["tokens"],
        "signals": device.allocate((_SIZES["rows"], SIGNAL_COUNT), DType.FLOAT32),
    }
    sessions = [library.open(predict), library.open(signals)]
    launches = [sessions[0].bind(buffers), sessions[1].bind(measured)]
    fused = None
    for seed in range(3):
        inputs = _inputs(predict, seed)
        buffers["tokens"].write(inputs["tokens"])
        if fused is None:
            for launch in launches:
                launch.run()
            fused = device.fuse(launches)
            assert fused is not None
        else:
            fused.run()
        expected = oracle.signals(_read(buffers["tokens_out"]), inputs["tokens"].astype(np.float32))
        np.testing.assert_allclose(_read(measured["signals"]), expected, rtol=2e-5, atol=2e-6)
    assert fused is not None and fused.captured and device.graph_launches == 2
    assert [session.launches for session in sessions] == [3, 3]


def test_what_does_not_fit_is_refused(library: KernelLibrary) -> None:
    spec = signals_spec(_model(DType.FLOAT32))
    session = library.open(spec)
    buffers = _allocate(library.device, spec, _inputs(spec))
    with pytest.raises(EngineError, match="no buffer for reference"):
        session.bind({name: buffer for name, buffer in buffers.items() if name != "reference"})
    with pytest.raises(EngineError, match="the engine takes float32"):
        session.bind(buffers | {"tokens": library.device.allocate((4, 21, 24), DType.FLOAT16)})
    with Device.open() as second, pytest.raises(EngineError, match="Allocate it with that backend"):
        session.bind(buffers | {"tokens": second.allocate((4, 21, 24), DType.FLOAT32)})
    session.close()
    with pytest.raises(EngineError, match="the session is closed"):
        session.bind(buffers)


def test_a_part_that_no_kernel_computes_is_named(library: KernelLibrary) -> None:
    with pytest.raises(EngineError, match="block_00: no kernel computes this part"):
        library.open(PartSpec(name="block_00", inputs=(), outputs=()))


def test_ptx_that_the_driver_does_not_take_is_one_line(device: Device) -> None:
    library = KernelLibrary(device, b"// not PTX")
    with pytest.raises(EngineError, match=r"adacorr_signals_float32: the driver \(for CUDA [0-9.]+; 13.0 or later"):
        library.open(signals_spec(_model(DType.FLOAT32)))


def test_launches_keep_their_buffers_and_share_a_scratch(library: KernelLibrary, driver_count: DriverCount) -> None:
    spec = signals_spec(_model(DType.FLOAT16))
    session = library.open(spec)
    launches = [session.bind(_allocate(library.device, spec, _inputs(spec, seed))) for seed in range(2)]
    assert driver_count("live_allocations") == 2 * 3 + 1
    for launch in launches:
        launch.run()
    library.device.synchronize()


def test_a_closed_device_takes_the_scratch_along(driver_count: DriverCount) -> None:
    with Device.open() as device:
        spec = signals_spec(_model(DType.FLOAT32))
        library = KernelLibrary(device, compile_kernels())
        _run(library, spec, _inputs(spec))
        assert driver_count("live_allocations") == 1
    assert driver_count("live_allocations") == 0
