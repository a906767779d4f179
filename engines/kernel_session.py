"""Service parts computed by our own kernels (plugins/cuda) instead of an engine: what a GPU backend opens them as."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.cuda_core import CudaKernel, CudaStream
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer, device_buffer
from adacorr_deploy.plugins.kernels import KernelLaunch, KernelSpec, kernel_launch, kernel_of_part


class KernelLibrary:
    """The kernels of a PTX text on a device."""

    def __init__(self, device: Device, ptx: bytes) -> None:
        """Take what `plugins.kernel_compiler.compile_kernels` returned; the driver sees it with the first session."""
        self.device = device
        self._code = device.cuda.object_code(ptx)
        self._scratch: dict[tuple[str, tuple[int, ...]], DeviceBuffer] = {}

    def open(self, spec: PartSpec) -> KernelSession:
        """Open a service part.

        Raises:
            EngineError: If no kernel computes it, or the driver can't load the PTX.
        """
        kernel = kernel_of_part(spec.name)
        if kernel is None:
            raise EngineError(f"{spec.name}: no kernel computes this part. Open it with an engine.")
        return KernelSession(spec, self, kernel)

    def kernel(self, entry: str) -> CudaKernel:
        """Return a kernel by its name in the PTX.

        Raises:
            EngineError: If there is none of that name, or the driver can't load the PTX.
        """
        self.device.make_current()
        what = f"{entry}: the driver (for CUDA {self.device.driver_version}; 13.0 or later is needed) can't load it"
        with self.device.errors(what):
            return self._code.get_kernel(entry)

    def scratch(self, launch: KernelLaunch) -> DeviceBuffer | None:
        """Return a kernel's scratch memory: one for all its launches of a shape, since each leaves it fit for the next.

        Raises:
            EngineError: If the memory can't be had.
        """
        if launch.scratch is None:
            return None
        key = launch.entry, launch.scratch
        if key not in self._scratch:
            self._scratch[key] = self.device.allocate(launch.scratch, DType.FLOAT32)
        return self._scratch[key]


class KernelSession:
    """An opened service part; any number of bindings of it may be alive at once, for the same or other axis sizes."""

    def __init__(self, spec: PartSpec, library: KernelLibrary, kernel: KernelSpec) -> None:
        self.spec = spec
        self._library = library
        self._kernel = kernel
        tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
        self._precision = tensors[kernel.rows].dtype
        self._function: CudaKernel | None = library.kernel(kernel.entry(self._precision))
        self.launches = 0

    def bind(self, buffers: Mapping[str, Buffer]) -> DeviceLaunch:
        """Bind every input and output by address.

        Raises:
            EngineError: If a tensor is missing or doesn't fit, an output overlaps another tensor, or the sizes are
                beyond what a kernel takes.
        """
        if self._function is None:
            raise EngineError(f"{self.spec.name}: the session is closed. Open the bundle again.")
        check_binding(self.spec, buffers)
        device, function = self._library.device, self._function
        bound = {name: device_buffer(buffer, device) for name, buffer in buffers.items()}
        launch = kernel_launch(self._kernel, self._precision, {name: buffer.shape for name, buffer in bound.items()})
        scratch = self._library.scratch(launch)
        arguments = (
            *(bound[name].address for name in launch.inputs),
            *(ctypes.c_int32(value) for value in launch.integers),
            *(bound[name].address for name in launch.outputs),
            *(() if scratch is None else (scratch.address,)),
        )
        config = device.cuda.launch_config(launch.grid, launch.block, launch.shared_bytes)

        def enqueue(stream: CudaStream) -> None:
            device.cuda.launch(stream, config, function, arguments)

        return DeviceLaunch(
            device,
            self.spec.name,
            enqueue,
            on_run=self._count,
            keeps=(*bound.values(), scratch, self._library),
            own_graph=False,
        )

    def close(self) -> None:
        """Give the kernel up; launches that exist keep it."""
        self._function = None

    def _count(self) -> None:
        self.launches += 1
