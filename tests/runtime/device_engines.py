"""Engines of the tiny DiT for a GPU's stream: NumPy functions that the stand-in for NVIDIA's driver runs in its order.

They read and write device memory, which a real GPU would not let them: they serve under the stand-in alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.specs import ModelSpec, PartSpec
from adacorr_deploy.engines.backend import Artefact, Buffer
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.cuda_core import CudaStream
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer, device_buffer
from adacorr_deploy.engines.gpu_backend import GpuBackend
from adacorr_deploy.plugins.kernel_compiler import DECISIONS_PROGRAM, compile_kernels
from adacorr_deploy.plugins.kernels import kernel_of_part
from tests.runtime.tiny_dit import Part, TinyDiT

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DeviceEngines(GpuBackend):
    """A backend whose service parts are our kernels, and whose other parts are the tiny DiT's NumPy functions."""

    name = "fake"
    opens_onnx = False
    engine_build = None

    def __init__(self, model: TinyDiT, kernels: Path) -> None:
        super().__init__()
        self._functions = {name: function for name, (_, function) in model.parts().items()}
        self._kernels = kernels / "kernels.ptx"
        if not self._kernels.exists():
            self._kernels.write_bytes(compile_kernels())
            self._kernels.with_name("decisions.ptx").write_bytes(compile_kernels(program=DECISIONS_PROGRAM))

    def for_model(self, model: ModelSpec) -> None:
        """Take note of nothing: parts run at any size."""

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        return Artefact(path=onnx_path)

    def check_compatible(self, build: EngineBuild | None) -> None:
        """NumPy functions run anywhere."""

    def open(self, artefact: Artefact, spec: PartSpec) -> FunctionSession:
        if kernel_of_part(spec.name) is not None:
            session = self.open_service_part(Artefact(path=self._kernels), spec)
            assert session is not None
            return session  # type: ignore[return-value]
        return FunctionSession(self, spec, self._functions[spec.name])


class FunctionSession:
    def __init__(self, backend: GpuBackend, spec: PartSpec, function: Part) -> None:
        self.backend = backend
        self.spec = spec
        self.function = function
        self.launches = 0

    def bind(self, buffers: Mapping[str, Buffer]) -> DeviceLaunch:
        check_binding(self.spec, buffers)
        device = self.backend.device
        bound = {name: device_buffer(buffer, device) for name, buffer in buffers.items()}
        outputs = [tensor.name for tensor in self.spec.outputs]

        def run(_: object) -> None:
            arrays = {name: _memory(buffer) for name, buffer in bound.items()}
            results = self.function({name: array.copy() for name, array in arrays.items() if name not in outputs})
            for name in outputs:
                arrays[name][...] = results[name]

        callback = _HostFunction(run)
        driver = ctypes.CDLL("libcuda.so.1")

        def enqueue(stream: CudaStream) -> None:
            assert driver.stand_in_launch(ctypes.c_void_p(int(stream.handle)), callback, None) == 0

        return DeviceLaunch(device, self.spec.name, enqueue, on_run=self._count, keeps=(callback, *bound.values()))

    def close(self) -> None:
        """Nothing is held."""

    def _count(self) -> None:
        self.launches += 1


def _memory(buffer: DeviceBuffer) -> NDArray[np.generic]:
    memory = (ctypes.c_uint8 * buffer.size_bytes).from_address(buffer.address)
    return np.ctypeslib.as_array(memory).view(buffer.dtype.numpy).reshape(buffer.shape)
