"""A GPU as the runtime uses it: one stream, its memory, and counters of what made the host wait."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Launch
from adacorr_deploy.engines.cuda_core import (
    Cuda,
    CudaEvent,
    CudaGpu,
    CudaGraphBuilder,
    CudaMemory,
    CudaStream,
    EngineErrors,
    load_cuda,
)
from adacorr_deploy.engines.device_launch import DeviceLaunch, fused_launch
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.pinned_memory import PinnedBlocks

_MIB: Final = 1 << 20


class Device:
    """An opened GPU. Everything that is asked of it goes to one stream, in order; only the methods below wait.

    One thread at a time may use a device object, and any thread may. Buffers and launches of two device objects never
    mix, even on one GPU: nothing orders their streams. Use it as a context manager, or call `close`.

    Attributes:
        ordinal: Which GPU of the process, from 0.
        name: What the driver calls it.
        synchronisations: How often the host waited for all of the device's work.
        graph_launches: How often a captured graph was launched.
        graphs: Whether launches may become graphs from now on; benchmarks turn it off to measure what graphs save.
        pinned: The host memory that copies go through.
        cuda: The driver's API, for what enqueues work.
    """

    def __init__(self, cuda: Cuda, gpu: CudaGpu, ordinal: int) -> None:
        self.ordinal = ordinal
        self.name = gpu.name
        self.synchronisations = 0
        self.graph_launches = 0
        self.graphs = True
        self.cuda = cuda
        self._gpu = gpu
        self._stream = gpu.create_stream()
        self._pool = cuda.device_pool(ordinal)
        self._allocations: weakref.WeakSet[CudaMemory] = weakref.WeakSet()
        self._event_waits = 0
        self._closed = False
        self.pinned = PinnedBlocks(cuda.pinned_memory(), self._stream)

    @classmethod
    def open(cls, ordinal: int = 0) -> Device:
        """Open a GPU.

        Raises:
            BackendUnavailableError: If the packages, the driver or that GPU are not here.
            EngineError: If the GPU refuses a stream.
        """
        cuda = load_cuda()
        count = cuda.gpu_count()
        if not 0 <= ordinal < count:
            raise BackendUnavailableError(
                f"There is no GPU {ordinal}: this process sees {count}, numbered from 0. Check CUDA_VISIBLE_DEVICES."
            )
        with cuda.engine_errors(f"GPU {ordinal} can't be opened"):
            return cls(cuda, cuda.gpu(ordinal), ordinal)

    # --- What it is ----------------------------------------------------------------------------------------------

    @property
    def compute_capability(self) -> str:
        """As compilers call it: `sm_90`."""
        capability = self._gpu.compute_capability
        return f"sm_{capability.major}{capability.minor}"

    @property
    def driver_version(self) -> str:
        """The newest CUDA version that the driver runs: `13.0`."""
        version = int(self.cuda.call("cuDriverGetVersion")[0])
        return f"{version // 1000}.{version % 1000 // 10}"

    def memory_bytes(self) -> tuple[int, int]:
        """Return the GPU's free and total memory, whoever uses it."""
        self.make_current()
        free, total = self.cuda.call("cuMemGetInfo")
        return int(free), int(total)

    @property
    def stream(self) -> CudaStream:
        return self._stream

    @property
    def event_waits(self) -> int:
        """How often the host waited for one place in the stream: for a late read, or for pinned memory."""
        return self._event_waits + self.pinned.waits

    def __str__(self) -> str:
        return f"GPU {self.ordinal} ({self.name})"

    # --- Memory --------------------------------------------------------------------------------------------------

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> DeviceBuffer:
        """Return a zeroed buffer, 256-byte aligned.

        Raises:
            EngineError: If the memory can't be had; the message says how much is free.
        """
        self.make_current()
        count_bytes = math.prod(shape) * dtype.numpy.itemsize
        try:
            memory = self._pool.allocate(max(count_bytes, 1), stream=self._stream)
            memory.fill(0, stream=self._stream)
        except self.cuda.errors as error:
            raise EngineError(self._no_memory(shape, dtype, count_bytes, error)) from error
        self._allocations.add(memory)
        return DeviceBuffer(self, memory, shape, dtype, address=int(memory.handle))

    def _no_memory(self, shape: tuple[int, ...], dtype: DType, count_bytes: int, error: Exception) -> str:
        free, total = self.memory_bytes()
        return (
            f"No memory on {self} for a buffer of shape {shape}, {dtype.value}: takes {count_bytes / _MIB:,.1f} MiB, "
            f"free are {free / _MIB:,.1f} of {total / _MIB:,.1f} MiB ({str(error).partition(':')[0]}). Sample "
            "fewer images at a time, or end what else uses the GPU (nvidia-smi)."
        )

    def copy(self, target: int, source: int, count_bytes: int) -> None:
        """Queue a copy between two addresses, each on this GPU or in pinned memory."""
        self.make_current()
        self.cuda.call("cuMemcpyAsync", target, source, count_bytes, self._stream.handle)

    # --- Launches ------------------------------------------------------------------------------------------------

    def fuse(self, launches: Sequence[Launch]) -> DeviceLaunch | None:
        """Return one launch that replays these as a graph, each counted by its session, or None if that saves nothing.

        It is None for fewer than two launches, if one is not of this device, can't be captured, or has not run yet, and
        while `graphs` is off.
        """
        return fused_launch(self, launches)

    def graph_builder(self) -> CudaGraphBuilder:
        """Return a recorder of work, on a stream of its own."""
        self.make_current()
        return self._gpu.create_graph_builder()

    def make_current(self) -> None:
        """Make this GPU the calling thread's, as the driver, TensorRT and ONNX Runtime expect of their callers.

        Raises:
            EngineError: If the device is closed.
        """
        if self._closed:
            raise EngineError(f"{self} was closed. Open the bundle again.")
        self._gpu.set_current()

    # --- Waiting -------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Return when everything put on the stream so far has finished.

        Raises:
            EngineError: If something of it failed: a GPU reports that only here.
        """
        self.make_current()
        self.synchronisations += 1
        with self.errors("The GPU's work failed"):
            self._stream.sync()

    def wait(self, event: CudaEvent) -> None:
        """Return when the stream has passed `event`.

        Raises:
            EngineError: If something before it failed.
        """
        self._event_waits += 1
        with self.errors("The GPU's work failed"):
            event.sync()

    def errors(self, what: str) -> EngineErrors:
        """Raise what the driver refuses inside as an EngineError that begins with `what` and names the GPU."""
        return self.cuda.engine_errors(f"{what} on {self}")

    # --- The end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the GPU, and free everything: buffers and launches can't be used any more. Twice does nothing."""
        if self._closed:
            return
        try:
            self.synchronize()
        finally:
            self._closed = True
            for memory in list(self._allocations):
                memory.close()
            self.pinned.close()
            self._stream.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def gpu_is_available() -> bool:
    """Whether the packages, a driver and a GPU are here."""
    try:
        return load_cuda().gpu_count() > 0
    except BackendUnavailableError:
        return False
