"""engine_case.py on the stand-in for NVIDIA's driver, whose engines are ONNX Runtime's in host functions.

`tensorrt-rtx` is replaced by them: they go through the device's stream, buffers, graphs and our kernels as plans would.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final
from unittest.mock import patch

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from adacorr_deploy import engines
from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.specs import PartSpec
from adacorr_deploy.engines.backend import Artefact, Buffer, Session
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.cuda_core import CudaStream
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer, device_buffer
from adacorr_deploy.engines.gpu_backend import GpuBackend

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class StandInEngines(GpuBackend):
    name: Final = "tensorrt-rtx"
    opens_onnx: Final = False
    engine_build: Final = None

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        return self.build_service_part(spec, artefact_dir) or Artefact(path=onnx_path)

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Take anything."""

    def open(self, artefact: Artefact, spec: PartSpec) -> Session:
        return self.open_service_part(artefact, spec) or StandInSession(spec, self.device, artefact.path)


class StandInSession:
    def __init__(self, spec: PartSpec, device: Device, onnx: Path) -> None:
        self.spec = spec
        self.launches = 0
        self._device = device
        self._session = ort.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
        self._functions: list[Callable[..., None]] = []  # which the driver calls by their bare addresses

    def bind(self, buffers: Mapping[str, Buffer]) -> DeviceLaunch:
        check_binding(self.spec, buffers)
        bound = {name: device_buffer(buffer, self._device) for name, buffer in buffers.items()}

        def run(_: object) -> None:
            inputs = {tensor.name: memory_of(bound[tensor.name]).copy() for tensor in self.spec.inputs}
            results = self._session.run([tensor.name for tensor in self.spec.outputs], inputs)
            for tensor, result in zip(self.spec.outputs, results, strict=True):
                np.copyto(memory_of(bound[tensor.name]), result)

        function = _HostFunction(run)
        self._functions.append(function)

        def enqueue(stream: CudaStream) -> None:
            driver = ctypes.CDLL("libcuda.so.1")
            assert driver.cuLaunchHostFunc(ctypes.c_void_p(int(stream.handle)), function, None) == 0

        return DeviceLaunch(self._device, self.spec.name, enqueue, on_run=self._count, keeps=tuple(bound.values()))

    def close(self) -> None:
        """Keep everything: launches may still be queued."""

    def _count(self) -> None:
        self.launches += 1


def memory_of(buffer: DeviceBuffer) -> NDArray[np.generic]:
    """Return the memory itself; the driver lets the host touch it only in its own functions."""
    dtype = buffer.dtype.numpy
    raw = (ctypes.c_ubyte * (math.prod(buffer.shape) * dtype.itemsize)).from_address(buffer.address)
    return np.frombuffer(memoryview(raw), dtype).reshape(buffer.shape)


if __name__ == "__main__":
    from engine_case import main

    with patch.dict(engines.BACKENDS, {StandInEngines.name: lambda options: StandInEngines()}):
        sys.exit(main())
