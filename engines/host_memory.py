"""Buffers in the host's memory, for the backends that compute on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Buffer

ALIGNMENT_BYTES: Final = 64  # a cache line, and the widest vector


class HostBuffer:
    """A row-major NumPy array whose memory stays where it is, or a view along the first axis of one."""

    __slots__ = ("_array",)

    def __init__(self, array: NDArray[np.generic]) -> None:
        if not array.flags.c_contiguous:
            raise EngineError(
                f"A buffer must be dense and row-major, got strides {array.strides} for shape {array.shape}. "
                "Take views along the first axis, with step 1."
            )
        self._array = array

    @classmethod
    def allocate(cls, shape: tuple[int, ...], dtype: DType) -> HostBuffer:
        """Return a zeroed buffer, 64-byte aligned.

        Raises:
            EngineError: If the memory can't be had.
        """
        count_bytes = math.prod(shape) * dtype.numpy.itemsize
        try:
            memory = np.zeros(count_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
        except (MemoryError, ValueError) as error:
            raise EngineError(
                f"No memory for a buffer of shape {shape}, {dtype.value} ({count_bytes} bytes): {error}. "
                "Sample fewer images at a time."
            ) from error
        start = -memory.ctypes.data % ALIGNMENT_BYTES
        return cls(memory[start : start + count_bytes].view(dtype.numpy).reshape(shape))

    @property
    def array(self) -> NDArray[np.generic]:
        """The memory itself, not a copy."""
        return self._array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> DType:
        return DType.from_numpy(self._array.dtype)

    @property
    def address(self) -> int:
        return self._array.ctypes.data

    def __getitem__(self, index: int | slice) -> HostBuffer:
        """Return a view along the first axis: same memory, no copy.

        Raises:
            EngineError: If the index is out of range, or skips rows.
        """
        if not self.shape or (isinstance(index, int) and not -self.shape[0] <= index < self.shape[0]):
            raise EngineError(f"Index {index} is outside a buffer of shape {self.shape}.")
        # An Ellipsis keeps a 0-dimensional result an array over the same memory: a[i] alone would copy a scalar.
        return HostBuffer(self._array[index, ...])

    def write(self, values: NDArray[np.generic]) -> None:
        """Copy host values in.

        Raises:
            EngineError: If shape or dtype differ: nothing is cast or broadcast silently.
        """
        if values.shape != self.shape or values.dtype != self._array.dtype:
            raise EngineError(
                f"A buffer of shape {self.shape}, {self.dtype.value} can't take values of shape {values.shape}, "
                f"{values.dtype}. Cast and reshape them first."
            )
        np.copyto(self._array, values)

    def copy_from(self, other: Buffer) -> None:
        """Copy another host buffer of the same shape and dtype into this one.

        Raises:
            EngineError: If shape, dtype or kind of memory differ.
        """
        self.write(host_array(other))

    def read(self) -> NDArray[np.generic]:
        """Return a copy."""
        return self._array.copy()

    def read_later(self) -> Callable[[], NDArray[np.generic]]:
        """Copy now, and return what gives the copy: on the CPU every launch has finished."""
        copy = self.read()
        return lambda: copy


def host_array(buffer: Buffer) -> NDArray[np.generic]:
    """Return the memory of a host buffer.

    Raises:
        EngineError: If the buffer belongs to another kind of backend.
    """
    if not isinstance(buffer, HostBuffer):
        raise EngineError(f"Expected a buffer of a CPU backend, got a {type(buffer).__name__}. Allocate it there.")
    return buffer.array
