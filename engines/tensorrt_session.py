"""Opened plans on a GPU, in the device's one stream and over its buffers.

Parts of one structure share a plan, and all parts share their scratch memory, since one runs after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Artefact, Buffer
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.cuda_core import CudaStream
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer, device_buffer
from adacorr_deploy.engines.tensorrt_modules import Context, Engine, Log, TensorRTModule, new_log

_MIB: Final = 1 << 20
_REBUILD: Final = "Rebuild the bundle on or for this machine with adacorr-build."
_STORED_TYPES: Final[Mapping[str, DType]] = {"F32": DType.FLOAT32, "F16": DType.FLOAT16, "BF16": DType.BFLOAT16}


class Plans:
    """The plans that are open on a device."""

    def __init__(self, module: TensorRTModule, trt: ModuleType, device: Device) -> None:
        self.device = device
        self.log: Log = new_log(trt)
        self._module = module
        self._trt = trt
        self._runtime = trt.Runtime(self.log)
        self._engines: dict[Path, Engine] = {}
        self._scratch: DeviceBuffer | None = None

    def engine(self, path: Path, part: str) -> Engine:
        """Return an opened plan; the same for the same file.

        Raises:
            EngineError: If it is no plan, was made for another GPU or version, or doesn't fit the GPU's memory.
        """
        if path not in self._engines:
            plan = _content(path, part)
            if fault := self._module.plan_fault(self._trt, self._runtime, plan):
                raise EngineError(f"{part}: {path} can't run on {self.device}: {fault}. {_REBUILD}")
            self._check_room(len(plan), part)
            self.device.make_current()
            self.log.clear()
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise EngineError(f"{part}: {self._module.title} can't open {path}: {self.log.reason()}. {_REBUILD}")
            self._engines[path] = engine
        return self._engines[path]

    def context(self, engine: Engine, shapes: Mapping[str, tuple[int, ...]], part: str) -> tuple[Context, DeviceBuffer]:
        """Return a new execution context for fixed input shapes, and its scratch memory, which must live as long.

        Raises:
            EngineError: If a shape is outside the plan's profile, or the memory can't be had.
        """
        self.device.make_current()
        self.log.clear()
        context = self._module.new_context(self._trt, engine)
        refused = [name for name, shape in shapes.items() if not context.set_input_shape(name, shape)]
        if refused:
            raise EngineError(
                f"{part}: {refused[0]} of shape {shapes[refused[0]]} is outside the plan's profile "
                f"({self.log.reason()}). Change the request, or rebuild with adacorr-build --batch or --max-steps."
            )
        needed = context.update_device_memory_size_for_shapes()
        scratch = self._scratch_of(needed)
        context.set_device_memory(scratch.address, needed)
        return context, scratch

    def upload(self, weights: Path, part: str) -> dict[str, DeviceBuffer]:
        """Copy a weight file into buffers, by the tensors' names.

        Raises:
            EngineError: If it is no such file, or doesn't fit the GPU's memory.
        """
        import safetensors

        content = _content(weights, part)
        self._check_room(len(content), part)
        buffers = {}
        try:
            tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:
            raise EngineError(f"{part}: {weights} is no safetensors file ({error}). {_REBUILD}") from error
        for name, tensor in tensors:
            dtype = _STORED_TYPES.get(tensor["dtype"])
            if dtype is None:
                raise EngineError(f"{part}: weight {name} is {tensor['dtype']}, known are {', '.join(_STORED_TYPES)}.")
            buffers[name] = self.device.allocate(tuple(tensor["shape"]), dtype)
            buffers[name].write(np.frombuffer(tensor["data"], dtype.numpy).reshape(tensor["shape"]))
        return buffers

    def close(self) -> None:
        """Let go of plans and scratch memory."""
        self._engines.clear()
        self._scratch = None

    def _check_room(self, size_bytes: int, part: str) -> None:
        free, total = self.device.memory_bytes()
        if size_bytes > free:
            raise EngineError(
                f"{part} takes {size_bytes / _MIB:,.0f} MiB of {self.device}'s memory, and {free / _MIB:,.0f} of "
                f"{total / _MIB:,.0f} MiB are free. adacorr-build --inspect BUNDLE lists what every part takes; "
                "--weights inputs and --precision fp16 take less."
            )

    def _scratch_of(self, size_bytes: int) -> DeviceBuffer:
        """Return memory that every context may use in turn; those that were made before it grew keep the former."""
        if self._scratch is None or self._scratch.size_bytes < size_bytes:
            self._scratch = self.device.allocate((max(size_bytes, 1) + 3 >> 2,), DType.FLOAT32)
        return self._scratch


class TensorRTSession:
    """An opened part; any number of bindings of it may be alive at once, for the same or other axis sizes."""

    def __init__(self, spec: PartSpec, plans: Plans, artefact: Artefact) -> None:
        """Open the part's plan and upload its weights, if they are inputs.

        Raises:
            EngineError: If it can't be opened here, or takes other tensors than the spec and the weights give.
        """
        self.spec = spec
        self._plans = plans
        self._engine: Engine | None = plans.engine(artefact.path, spec.name)
        self._weights = plans.upload(artefact.weights, spec.name) if artefact.weights is not None else {}
        self._contexts: dict[tuple[tuple[str, int], ...], tuple[Context, DeviceBuffer]] = {}
        self.launches = 0
        self._check_tensors(self._engine)

    def bind(self, buffers: Mapping[str, Buffer]) -> DeviceLaunch:
        """Bind every input and output by address.

        Raises:
            EngineError: If a tensor is missing, doesn't fit, an output overlaps another tensor, or the sizes are
                outside the plan's profile.
        """
        if self._engine is None:
            raise EngineError(f"{self.spec.name}: the session is closed. Open the bundle again.")
        sizes = check_binding(self.spec, buffers)
        device = self._plans.device
        bound = {name: device_buffer(buffer, device) for name, buffer in buffers.items()} | self._weights
        key = tuple(sorted(sizes.items()))
        if key not in self._contexts:
            shapes = {tensor.name: buffers[tensor.name].shape for tensor in self.spec.inputs}
            self._contexts[key] = self._plans.context(self._engine, shapes, self.spec.name)
        (context, scratch), addresses = self._contexts[key], {name: buffer.address for name, buffer in bound.items()}

        def enqueue(stream: CudaStream) -> None:
            for name, address in addresses.items():  # launches of one size share the context
                context.set_tensor_address(name, address)
            if not context.execute_async_v3(int(stream.handle)):
                raise EngineError(f"{self.spec.name}: the engine failed to start: {self._plans.log.reason()}.")

        return DeviceLaunch(
            device, self.spec.name, enqueue, on_run=self._count, keeps=(context, scratch, *bound.values())
        )

    def close(self) -> None:
        """Give the plan and the weights up; what a launch still uses stays until that goes."""
        self._engine = None
        self._weights = {}
        self._contexts.clear()

    def _count(self) -> None:
        self.launches += 1

    def _check_tensors(self, engine: Engine) -> None:
        found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self.spec.inputs, *self.spec.outputs)} | self._weights.keys()
        if found != expected:
            raise EngineError(
                f"{self.spec.name}: the plan's tensors and those of its spec and weights differ in "
                f"{', '.join(sorted(found ^ expected))}. {_REBUILD}"
            )
        for name, weight in self._weights.items():  # the plan would read past a smaller one
            shape = tuple(engine.get_tensor_shape(name))
            if shape != weight.shape:
                raise EngineError(
                    f"{self.spec.name}: weight {name} is {weight.shape}, and its plan takes {shape}. {_REBUILD}"
                )


def _content(path: Path, part: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"{part}: {path} can't be read: {error}. {_REBUILD}") from error
