"""What goes into and comes out of a part: names, element types and shapes with named dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import DTypeLike

Dim = int | str  # a size, or the name of a dynamic axis


class DType(str, Enum):
    """Element type of a tensor; the value is NumPy's name for it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT64 = "int64"

    @property
    def numpy(self) -> np.dtype[np.generic]:
        return np.dtype(self.value)

    @classmethod
    def from_numpy(cls, dtype: DTypeLike) -> DType:
        return cls(np.dtype(dtype).name)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a part."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def resolved(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every named axis replaced by its size.

        Raises:
            KeyError: If `sizes` lacks a named axis (a bug of the caller, never of a user).
        """
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSpec:
    """One part: embed, condition, block_00…, head, or a service part of the runtime (signals, predict_…, blend_…)."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def tensor(self, name: str) -> TensorSpec:
        """Return the input or output called `name`."""
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(f"{self.name} has no tensor {name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the runtime must know of an exported model, whatever its family."""

    family: str  # key of the exporter's table, e.g. "dit"
    precision: DType  # of weights and activations between parts
    latent_shape: tuple[int, int, int]  # (C, H, W)
    tokens: int  # N
    width: int  # D
    num_classes: int  # labels 0 … num_classes − 1; the null label of guidance is num_classes
    blocks: tuple[int, ...]  # transformer blocks in each block part: (1, 1, …), or (4, 4, 4) with segments of 4
    learned_variance: bool

    @property
    def block_names(self) -> tuple[str, ...]:
        return tuple(f"block_{index:02d}" for index in range(len(self.blocks)))
