"""TensorRT and TensorRT for RTX: one Python API, two modules. All that differs between them stands here.

| | tensorrt | tensorrt_rtx |
|---|---|---|
| compiles | for the GPU in the machine, tuned on it | without a GPU, for the compute capabilities that are named |
| tuning | timed once per kind of layer, kept in a timing cache | none: kernels are chosen, and specialised when run |
| other releases may run a plan | if built version-compatible | no |
| plugins | our op's kernels (plugins/tensorrt_op.py) | none: registering one and parsing aborts the process |

TensorRT itself was never run in this project: its library can't be installed where it is developed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Final, Protocol

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError


class Log(Protocol):
    """A logger for the modules that keeps what they complain of, in place of writing it to the terminal."""

    def clear(self) -> None: ...

    def reason(self) -> str:
        """Return the last complaints since `clear`, as one line."""
        ...


class Context(Protocol):
    """What is used here of the modules' `IExecutionContext`. The modules carry no types that a checker sees."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def update_device_memory_size_for_shapes(self) -> int: ...

    def set_device_memory(self, memory: int, size: int) -> None: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class RuntimeConfig(Protocol):
    """What is used here of `IRuntimeConfig`, of TensorRT for RTX."""

    dynamic_shapes_kernel_specialization_strategy: object

    def set_execution_context_allocation_strategy(self, strategy: object) -> None: ...


class Engine(Protocol):
    """What is used here of the modules' `ICudaEngine`."""

    @property
    def num_io_tensors(self) -> int: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...

    def create_runtime_config(self) -> RuntimeConfig: ...

    def create_execution_context(self, how: object) -> Context: ...


class Runtime(Protocol):
    """What is used here of the modules' `Runtime`."""

    engine_header_size: int

    def get_engine_validity(self, header: bytes) -> tuple[object, int]: ...


class TimingCache(Protocol):
    """What is used here of `ITimingCache`."""

    def serialize(self) -> bytes: ...


class BuilderConfig(Protocol):
    """What is used here of the modules' `IBuilderConfig`, which has no types of its own."""

    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: object, index: int) -> bool: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTModule:
    """One of the two modules, before it is imported."""

    backend: str  # as `--backend` names it
    package: str  # of Python
    extra: str  # of pyproject.toml
    title: str
    compiles_without_gpu: bool  # and then for targets that a user names
    version_compatible: bool  # whether its plans can be made to open with later releases
    plugins: bool
    checks_plans: bool  # can say from a plan's header whether it runs here
    specialises_kernels: bool  # compiles kernels for the sizes at hand when it runs

    def load(self) -> ModuleType:
        """Import the module.

        Raises:
            BackendUnavailableError: If it is not installed, or its library can't be loaded.
        """
        try:
            return importlib.import_module(self.package)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # its stub raises RuntimeError where the library is missing
            raise BackendUnavailableError(
                f"Backend {self.backend} can't be loaded ({error}). "
                f"Install it with: pip install 'adacorr-deploy[{self.extra}]'"
            ) from error

    def set_targets(self, trt: ModuleType, config: BuilderConfig, targets: Sequence[str]) -> None:
        """Tell a builder configuration which GPUs to compile for.

        Raises:
            EngineError: If this module doesn't compile for one of them, or for any but the GPU in the machine.
        """
        if not targets:
            return
        if not self.compiles_without_gpu:
            raise EngineError(
                f"{self.title} compiles for the GPU in the machine, so it takes no list of GPUs (got "
                f"{', '.join(targets)}). Leave --gpu out, or use --backend {TENSORRT_RTX.backend}."
            )
        known = known_targets(trt)
        if unknown := [target for target in targets if target not in known]:
            raise EngineError(
                f"{self.title} {trt.__version__} does not compile for {', '.join(unknown)}; it knows "
                f"{', '.join(known)}. Name those with --gpu."
            )
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, known[target]), index)

    def new_context(self, trt: ModuleType, engine: Engine) -> Context:
        """Return an execution context whose scratch memory is given to it by the caller.

        Kernels for dynamic shapes are specialised at once: a captured graph would keep those that come before.
        """
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.specialises_kernels:
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return engine.create_execution_context(config)

    def plan_fault(self, trt: ModuleType, runtime: Runtime, plan: bytes) -> str | None:
        """Return why a plan can't be opened here, from its header alone, or None; only TensorRT for RTX can tell."""
        if not self.checks_plans:
            return None
        validity, bits = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if validity != trt.EngineValidity.INVALID:
            return None
        reasons = [
            name.lower().replace("_", " ")
            for name, flag in trt.EngineInvalidityDiagnostics.__members__.items()
            if bits & int(flag)
        ]
        return ", ".join(reasons) or "it is not valid for this machine"


def new_log(trt: ModuleType) -> Log:
    """Return a logger for builders, parsers and runtimes of a module."""

    class KeptLog(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._complaints: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._complaints.append(message)

        def clear(self) -> None:
            self._complaints.clear()

        def reason(self) -> str:
            return "; ".join(" ".join(text.split()) for text in self._complaints[-2:]) or "it gave no reason"

    return KeptLog()


def known_targets(trt: ModuleType) -> dict[str, str]:
    """Return the module's names of the compute capabilities that it compiles for, by ours: `sm_86` → `SM86`."""
    return {
        f"sm_{match[1]}": name
        for name in sorted(trt.ComputeCapability.__members__, key=lambda name: (len(name), name))
        if (match := re.fullmatch(r"SM([0-9]+)", name))
    }


TENSORRT: Final = TensorRTModule(
    backend="tensorrt",
    package="tensorrt",
    extra="tensorrt",
    title="TensorRT",
    compiles_without_gpu=False,
    version_compatible=True,
    plugins=True,
    checks_plans=False,
    specialises_kernels=False,
)
TENSORRT_RTX: Final = TensorRTModule(
    backend="tensorrt-rtx",
    package="tensorrt_rtx",
    extra="rtx",
    title="TensorRT for RTX",
    compiles_without_gpu=True,
    version_compatible=False,
    plugins=False,
    checks_plans=True,
    specialises_kernels=True,
)
