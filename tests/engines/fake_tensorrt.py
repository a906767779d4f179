"""A stand-in for the module tensorrt_rtx where it needs a GPU: plans are JSON, and engines add their inputs up.

It keeps to the signatures that the real module's docstrings give, and to what its documentation says of them: shapes
before memory, memory before a launch, addresses for every tensor, work on the given stream and nowhere else.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import TypedDict

import numpy as np

__version__ = "1.7.1.116"
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1


class EngineValidity(IntEnum):
    VALID = 0
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class ILogger:
    Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


class RuntimeConfig:
    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.allocation = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.allocation = strategy


class Context:
    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        assert config.allocation is ExecutionContextAllocationStrategy.USER_MANAGED
        # A captured graph would keep the kernels of before.
        assert config.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None
        self._kept: list[Callable[..., None]] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if shape[0] > self.engine.plan["most_rows"]:
            self.engine.log.log(ILogger.Severity.ERROR, f"{name} does not satisfy any optimization profile")
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.plan["tensors"]
        self.addresses[name] = memory
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes
        return 64 * next(iter(self.shapes.values()))[0]

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self.update_device_memory_size_for_shapes()
        self.scratch = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.scratch is not None and self.addresses.keys() == set(self.engine.plan["tensors"])
        if self.engine.plan["refuses"]:
            self.engine.log.log(ILogger.Severity.ERROR, "the launch was refused")
            return False
        count = int(np.prod(self.shapes["x"]))
        addresses, scratch = dict(self.addresses), self.scratch

        def run(_: object) -> None:
            total = sum(_floats(addresses[name], count).copy() for name in addresses if name != "y")
            _floats(scratch[0], count)[:] = total  # as an engine does with its activations
            _floats(addresses["y"], count)[:] = _floats(scratch[0], count)

        self._kept.append(_HostFunction(run))
        driver = ctypes.CDLL("libcuda.so.1")
        assert driver.stand_in_launch(ctypes.c_void_p(stream_handle), self._kept[-1], None) == 0
        return True


class Plan(TypedDict):
    tensors: list[str]
    most_rows: int
    refuses: bool


class Engine:
    def __init__(self, plan: Plan, log: ILogger) -> None:
        self.plan = plan
        self.log = log

    @property
    def num_io_tensors(self) -> int:
        return len(self.plan["tensors"])

    def get_tensor_name(self, index: int) -> str:
        return self.plan["tensors"][index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (3, 4) if name == "w" else (-1, 4)

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        return Context(self, config)


class Runtime:
    engine_header_size = 64

    def __init__(self, log: ILogger) -> None:
        self.log = log
        self.opened = 0

    def get_engine_validity(self, header: bytes) -> tuple[EngineValidity, int]:
        assert len(header) <= self.engine_header_size
        return (EngineValidity.INVALID, 2 + 4) if header.startswith(b"other") else (EngineValidity.VALID, 0)

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self.opened += 1
        try:
            return Engine(json.loads(plan), self.log)
        except ValueError:
            self.log.log(ILogger.Severity.ERROR, "magicTag does not match")
            return None


def _floats(address: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
