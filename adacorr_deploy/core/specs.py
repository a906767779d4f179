"""What goes into and comes out of a part: names, element types and shapes with named dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

Dim = int | str  # a size, or the name of a dynamic axis

MODULATIONS_PER_BLOCK: Final = 6  # per transformer block: shift, scale and gate of the attention, then of the MLP


def unit_names(blocks: int) -> tuple[str, ...]:
    """Return the outputs of a part of so many transformer blocks that slots keep: results before their adaLN gates."""
    return tuple(f"{unit}_{block}" for block in range(blocks) for unit in ("attention", "mlp"))


class DType(str, Enum):
    """Element type of a tensor; the value is NumPy's name for it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """NumPy's type; it has no bfloat16 of its own, so that one is ml_dtypes'."""
        if self is DType.BFLOAT16:
            import ml_dtypes

            bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        name: str = self.value
        return np.dtype(name)

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
