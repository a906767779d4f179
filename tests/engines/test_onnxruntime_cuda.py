"""ONNX Runtime's code for a GPU: its real API over the device's buffers and stream, with its CPU kernels for CUDA's.

What stands for the CUDA provider runs a session's work where that would: behind all that was put on the stream, and not
before. Device memory is closed to this process at any other time.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines import onnxruntime_cuda
from adacorr_deploy.engines.backend import Artefact, Buffer, Launch
from adacorr_deploy.engines.host_memory import HostBuffer
from adacorr_deploy.engines.onnxruntime_cpu import Provider, inference_session
from adacorr_deploy.engines.onnxruntime_cuda import OnnxRuntimeCudaBackend
from tests.engines.conftest import DriverCount
from tests.engines.onnx_graphs import WIDTH, part_spec, tensor, write_part

pytestmark = pytest.mark.gpu

_CUDA = "CUDAExecutionProvider"
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class CudaBinding:
    """`IOBinding` over device memory: only what is on this GPU may be bound."""

    def __init__(self, binding: ort.IOBinding, device_id: int) -> None:
        self.real = binding
        self._device_id = device_id

    def bind_input(self, name: str, device: str, device_id: int, element: object, shape: object, address: int) -> None:
        assert (device, device_id) == ("cuda", self._device_id)
        self.real.bind_input(name, "cpu", 0, element, shape, address)

    def bind_output(self, name: str, device: str, device_id: int, element: object, shape: object, address: int) -> None:
        assert (device, device_id) == ("cuda", self._device_id)
        self.real.bind_output(name, "cpu", 0, element, shape, address)


class CudaSession:
    """`InferenceSession` whose runs are put on the stream that its provider was given."""

    def __init__(self, session: ort.InferenceSession, options: dict[str, str]) -> None:
        assert all(isinstance(value, str) for value in options.values()), "the real one takes strings only"
        self._session = session
        self._stream = int(options["user_compute_stream"])
        self._device_id = int(options["device_id"])
        self._kept: list[Callable[..., None]] = []

    def get_providers(self) -> list[str]:
        return [_CUDA, *self._session.get_providers()]

    def io_binding(self) -> CudaBinding:
        return CudaBinding(self._session.io_binding(), self._device_id)

    def run_with_iobinding(self, binding: CudaBinding, run_options: ort.RunOptions) -> None:
        # With it, ONNX Runtime does not wait for the stream at the end of a run.
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        callback = _HostFunction(lambda _: self._session.run_with_iobinding(binding.real, run_options))
        self._kept.append(callback)
        driver = ctypes.CDLL("libcuda.so.1")
        assert driver.stand_in_launch(ctypes.c_void_p(self._stream), callback, None) == 0


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, driver_count: DriverCount) -> Iterator[OnnxRuntimeCudaBackend]:
    driver_count("operations")  # skips on a real driver, whose memory ONNX Runtime's CPU kernels can't read

    def opened(
        artefact: Artefact, spec: PartSpec, options: ort.SessionOptions, providers: Sequence[Provider]
    ) -> CudaSession:
        (provider,) = providers
        assert not isinstance(provider, str)
        name, settings = provider
        assert name == _CUDA
        return CudaSession(inference_session(artefact, spec, options, ["CPUExecutionProvider"]), dict(settings))

    monkeypatch.setattr(onnxruntime_cuda, "inference_session", opened)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [_CUDA, "CPUExecutionProvider"])
    made = OnnxRuntimeCudaBackend()
    yield made
    made.close()


def test_a_chain_of_sessions_runs_in_the_streams_order(
    backend: OnnxRuntimeCudaBackend, tmp_path: Path, driver_count: DriverCount
) -> None:
    spec = part_spec()
    session = backend.open(Artefact(path=write_part(tmp_path, "y = Add (x, x)", spec)), spec)
    first, second, third = (backend.allocate((3, WIDTH), DType.FLOAT32) for _ in range(3))
    launches = [session.bind({"x": first, "y": second}), session.bind({"x": second, "y": third})]
    ramp = np.arange(12, dtype=np.float32).reshape(3, WIDTH)
    backend.synchronize()
    before = driver_count("operations")
    for factor in (1, 10):  # the second time over what the first left
        first.write(factor * ramp)
        for launch in launches:
            launch.run()
        late = third.read_later()
        first.write(np.zeros_like(ramp))  # behind the launches, so they don't see it
        if factor == 1 and os.environ.get("STAND_IN_EAGER") != "1":
            assert driver_count("operations") == before, "nothing has waited yet"
        np.testing.assert_array_equal(late(), 4 * factor * ramp)
    assert session.launches == 4
    assert backend.device.synchronisations == 1


def test_bfloat16_is_bound_by_its_number(backend: OnnxRuntimeCudaBackend, tmp_path: Path) -> None:
    spec = part_spec(inputs=(tensor("x", dtype=DType.BFLOAT16),), outputs=(tensor("y"),))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["x"], ["y"], to=onnx.TensorProto.FLOAT)],
        "part",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, ["rows", WIDTH])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", WIDTH])],
    )
    path = tmp_path / "part.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    session = backend.open(Artefact(path=path), spec)
    x, y = backend.allocate((2, WIDTH), DType.BFLOAT16), backend.allocate((2, WIDTH), DType.FLOAT32)
    values = np.linspace(-3, 3, 2 * WIDTH).reshape(2, WIDTH).astype(ml_dtypes.bfloat16)
    x.write(values)
    session.bind({"x": x, "y": y}).run()
    np.testing.assert_array_equal(y.read(), values.astype(np.float32))


def test_a_buffer_of_the_host_is_refused(backend: OnnxRuntimeCudaBackend, tmp_path: Path) -> None:
    session = backend.open(Artefact(path=write_part(tmp_path, "y = Relu (x)", part_spec())), part_spec())
    buffers: dict[str, Buffer] = {
        "x": HostBuffer.allocate((1, WIDTH), DType.FLOAT32),
        "y": backend.allocate((1, WIDTH), DType.FLOAT32),
    }
    with pytest.raises(EngineError, match="Expected a buffer of GPU 0"):
        session.bind(buffers)


def test_what_can_not_be_captured_is_neither_fused_nor_decided_on_the_device(
    backend: OnnxRuntimeCudaBackend, tmp_path: Path
) -> None:
    session = backend.open(Artefact(path=write_part(tmp_path, "y = Relu (x)", part_spec())), part_spec())
    x, y = (backend.allocate((1, WIDTH), DType.FLOAT32) for _ in range(2))
    fuse: Callable[[Sequence[Launch]], object] = backend.fuse
    assert fuse([session.bind({"x": x, "y": y}), session.bind({"x": y, "y": x})]) is None
    with pytest.raises(EngineError, match=r"onnxruntime-cuda can't decide on the device: .*can't be in a graph"):
        backend.decision_graphs()


def test_a_provider_that_does_not_load_says_what_it_needs(
    backend: OnnxRuntimeCudaBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime falls back to the CPU without a word where CUDA's or cuDNN's libraries are missing."""
    monkeypatch.setattr(CudaSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"can't use GPU 0 .*cuDNN.*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        backend.open(Artefact(path=write_part(tmp_path, "y = Relu (x)", part_spec())), part_spec())
