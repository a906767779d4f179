"""What is used of cuda.core and cuda.bindings, which carry no types that a checker sees, and load only for a GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Final, Protocol, SupportsInt

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError

_SUCCESS: Final = 0


class CudaEvent(Protocol):
    """`cuda.core.Event`: a place in a stream that the host can wait for."""

    @property
    def is_done(self) -> bool: ...

    def sync(self) -> None: ...


class CudaStream(Protocol):
    """`cuda.core.Stream`: work runs in the order in which it was put there. `int(handle)` is a cudaStream_t."""

    @property
    def handle(self) -> SupportsInt: ...

    def sync(self) -> None: ...

    def record(self, event: CudaEvent | None = None) -> CudaEvent: ...

    def close(self) -> None: ...


class CudaMemory(Protocol):
    """`cuda.core.Buffer`: an allocation, freed in its stream's order when it is closed or forgotten."""

    @property
    def handle(self) -> SupportsInt: ...

    def fill(self, value: int, *, stream: CudaStream) -> None: ...

    def close(self) -> None: ...


class CudaMemoryResource(Protocol):
    """`cuda.core.MemoryResource`: device memory, or memory of the host that a GPU reads and writes on its own."""

    def allocate(self, size: int, *, stream: CudaStream) -> CudaMemory: ...


class CudaGraph(Protocol):
    """`cuda.core.graph.Graph`: recorded work, launched as one."""

    def launch(self, stream: CudaStream) -> None: ...

    def close(self) -> None: ...


class CudaGraphDefinition(Protocol):
    """`cuda.core.graph.GraphDefinition`."""

    @property
    def handle(self) -> SupportsInt: ...


class CudaCondition(Protocol):
    """`cuda.core.graph.GraphCondition`: what chooses a case. `int(handle)` is a cudaGraphConditionalHandle."""

    @property
    def handle(self) -> SupportsInt: ...


class CudaGraphBuilder(Protocol):
    """`cuda.core.graph.GraphBuilder`: what is put on its stream while it builds is recorded instead of run."""

    @property
    def stream(self) -> CudaStream: ...

    @property
    def graph_definition(self) -> CudaGraphDefinition: ...

    def begin_building(self, mode: str) -> CudaGraphBuilder: ...

    def end_building(self) -> CudaGraphBuilder: ...

    def create_condition(self, default_value: int) -> CudaCondition: ...

    def switch(self, condition: CudaCondition, count: int) -> tuple[CudaGraphBuilder, ...]: ...

    def complete(self) -> CudaGraph: ...

    def close(self) -> None: ...


class CudaKernel(Protocol):
    """`cuda.core.Kernel`: a function on the GPU."""


class CudaLaunchConfig(Protocol):
    """`cuda.core.LaunchConfig`: grid, block and shared memory of a launch."""


class CudaObjectCode(Protocol):
    """`cuda.core.ObjectCode`: PTX as a driver has it, translated for its GPU when the first kernel is asked for."""

    def get_kernel(self, name: str) -> CudaKernel: ...


class CudaComputeCapability(Protocol):
    """`ComputeCapability` of cuda.core."""

    major: int
    minor: int


class CudaGpu(Protocol):
    """`cuda.core.Device`: one object per GPU of the process."""

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> CudaComputeCapability: ...

    def set_current(self) -> None: ...

    def create_stream(self) -> CudaStream: ...

    def create_graph_builder(self) -> CudaGraphBuilder: ...


class EngineErrors:
    """A context that turns some errors into EngineErrors. It stands around every launch, so it is no generator."""

    __slots__ = ("_errors", "_what")

    def __init__(self, errors: tuple[type[Exception], ...], what: str) -> None:
        self._errors = errors
        self._what = what

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End.

        Raises:
            EngineError: In the place of an error of those kinds.
        """
        if isinstance(error, self._errors):
            raise EngineError(f"{self._what}: {error}") from error


@dataclass(frozen=True, slots=True)
class Cuda:
    """The loaded packages."""

    core: ModuleType
    driver: ModuleType
    errors: tuple[type[Exception], ...]  # what cuda.core raises where the driver or itself refuses

    def call(self, function: str, *arguments: object) -> tuple[SupportsInt, ...]:
        """Call a function of the driver, and return its results without the status.

        Raises:
            EngineError: If the status is an error; the message has the driver's name for it.
        """
        status, *results = getattr(self.driver, function)(*arguments)
        if int(status) != _SUCCESS:
            raise EngineError(f"{function} failed: {status.name}")
        return tuple(results)

    def engine_errors(self, what: str) -> EngineErrors:
        """Raise what cuda.core raises inside as an EngineError that begins with `what`."""
        return EngineErrors(self.errors, what)

    def node_count(self, graph: CudaGraphDefinition) -> int:
        """Return how many operations a graph holds."""
        _nodes, count = self.call("cuGraphGetNodes", graph.handle, 0)
        return int(count)

    def gpu_count(self) -> int:
        """Return how many GPUs the process sees.

        Raises:
            BackendUnavailableError: If there is no driver, or it sees none.
        """
        try:
            self.call("cuInit", 0)
            (count,) = self.call("cuDeviceGetCount")
        except (EngineError, RuntimeError) as error:  # a RuntimeError where there is no libcuda at all
            raise BackendUnavailableError(
                f"No GPU can be used here ({error}). Check nvidia-smi, or choose --backend onnxruntime, which runs "
                "bundles of fp32 and fp16 on the CPU; those of bf16 need a GPU."
            ) from error
        return int(count)

    def gpu(self, ordinal: int) -> CudaGpu:
        """Return a GPU, current in this thread from now on."""
        gpu: CudaGpu = self.core.Device(ordinal)
        gpu.set_current()
        return gpu

    def device_pool(self, ordinal: int) -> CudaMemoryResource:
        """Return a memory pool of its own on a GPU: what is freed goes back to the GPU, and not to other users."""
        pool: CudaMemoryResource = self.core.DeviceMemoryResource(ordinal, self.core.DeviceMemoryResourceOptions())
        return pool

    def object_code(self, ptx: bytes) -> CudaObjectCode:
        """Return PTX to take kernels from."""
        code: CudaObjectCode = self.core.ObjectCode.from_ptx(ptx)
        return code

    def launch_config(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int) -> CudaLaunchConfig:
        """Return how a kernel is to be launched."""
        config: CudaLaunchConfig = self.core.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
        return config

    def launch(
        self, stream: CudaStream, config: CudaLaunchConfig, kernel: CudaKernel, arguments: Sequence[object]
    ) -> None:
        """Put a kernel on a stream; a Python int is an address, and ctypes' numbers are what they are."""
        self.core.launch(stream, config, kernel, *arguments)

    def pinned_memory(self) -> CudaMemoryResource:
        """Return the source of page-locked host memory."""
        memory: CudaMemoryResource = self.core.LegacyPinnedMemoryResource()
        return memory


@functools.cache
def load_cuda() -> Cuda:
    """Import the packages.

    Raises:
        BackendUnavailableError: If they are not installed, or not with each other's versions.
    """
    try:
        import cuda.core
        from cuda.bindings import driver
        from cuda.core._utils.cuda_utils import CUDAError  # its only exception, and not exported
    except ImportError as error:
        raise BackendUnavailableError(
            f"The GPU runtime can't be loaded ({error}). Install it with: pip install 'adacorr-deploy[gpu]'"
        ) from error
    return Cuda(core=cuda.core, driver=driver, errors=(CUDAError, RuntimeError))
