"""The few names of `tensorrt` and `tensorrt.plugin` that our plugins use, with shapes as plain integers.

Written from the public documentation. It stands for the half that talks to Python: nothing is parsed, built or run.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import pytest

Function = TypeVar("Function", bound=Callable[..., Any])


class DataType(enum.Enum):
    FLOAT = "FP32"
    HALF = "FP16"
    BF16 = "BF16"
    INT64 = "INT64"


@dataclass
class TensorDesc:
    shape: Sequence[int]  # −1 where the size is known only when the engine runs
    dtype: DataType

    @property
    def shape_expr(self) -> list[int]:
        return list(self.shape)

    def like(self) -> TensorDesc:
        return TensorDesc(self.shape, self.dtype)


@dataclass
class AutoTuneCombination:
    io_types: str


@dataclass
class KernelLaunchParams:
    grid_x: int = 1
    grid_y: int = 1
    grid_z: int = 1
    block_x: int = 1
    block_y: int = 1
    block_z: int = 1
    shared_mem: int = 0


@dataclass
class SymInt32:
    value: int


class SymExprs(list[SymInt32]):
    @classmethod
    def from_tuple(cls, values: Sequence[SymInt32]) -> SymExprs:
        return cls(values)


def from_shape_expr(shape: Sequence[int], *, dtype: DataType) -> TensorDesc:
    return TensorDesc(shape, dtype)


@dataclass
class Registered:
    """A plugin's functions, as they were handed over."""

    register: Callable[..., tuple[TensorDesc, ...]]
    autotune: Callable[..., list[AutoTuneCombination]] | None = None
    aot_impl: Callable[..., tuple[str, bytes, KernelLaunchParams, SymExprs]] | None = None


@dataclass
class FakeTensorRT:
    module: ModuleType
    plugins: dict[str, Registered] = field(default_factory=dict)


def install(monkeypatch: pytest.MonkeyPatch, name: str = "tensorrt") -> FakeTensorRT:
    """Put the modules where an import finds them."""
    fake = FakeTensorRT(ModuleType(name))
    plugin, op = ModuleType(f"{name}.plugin"), SimpleNamespace()

    def register(plugin_id: str) -> Callable[[Function], Function]:
        def keep(function: Function) -> Function:
            namespace, _, short = plugin_id.partition("::")
            if plugin_id in fake.plugins or "." in plugin_id:
                raise ValueError(f"{plugin_id} can't be registered")
            fake.plugins[plugin_id] = Registered(function)
            setattr(op, namespace, getattr(op, namespace, SimpleNamespace()))
            setattr(getattr(op, namespace), short, function)
            return function

        return keep

    def registrar(what: str) -> Callable[[str], Callable[[Function], Function]]:
        def of_plugin(plugin_id: str) -> Callable[[Function], Function]:
            def keep(function: Function) -> Function:
                setattr(fake.plugins[plugin_id], what, function)
                return function

            return keep

        return of_plugin

    vars(fake.module).update(DataType=DataType, plugin=plugin)
    vars(plugin).update(
        op=op,
        register=register,
        autotune=registrar("autotune"),
        aot_impl=registrar("aot_impl"),
        TensorDesc=TensorDesc,
        AutoTuneCombination=AutoTuneCombination,
        KernelLaunchParams=KernelLaunchParams,
        SymInt32=SymInt32,
        SymIntExprs=SymExprs,
        SymExprs=SymExprs,
        from_shape_expr=from_shape_expr,
    )
    monkeypatch.setitem(sys.modules, name, fake.module)
    monkeypatch.setitem(sys.modules, f"{name}.plugin", plugin)
    return fake
