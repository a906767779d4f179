"""Buffers in a GPU's memory. All copies are put on the device's one stream, in order with the launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.engines.cuda_core import CudaMemory
from adacorr_deploy.engines.pinned_memory import CHUNK_BYTES, PinnedBlock

if TYPE_CHECKING:
    from adacorr_deploy.engines.device import Device


class DeviceBuffer:
    """A dense, row-major tensor on a GPU, or a view along the first axis of one; views keep the memory alive.

    `Device.allocate` makes one. The memory is freed behind all work that was queued when the last view went.
    """

    __slots__ = ("_address", "_device", "_dtype", "_memory", "_shape")

    def __init__(
        self, device: Device, memory: CudaMemory, shape: tuple[int, ...], dtype: DType, *, address: int
    ) -> None:
        self._device = device
        self._memory = memory
        self._shape = shape
        self._dtype = dtype
        self._address = address

    @property
    def device(self) -> Device:
        return self._device

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> DType:
        return self._dtype

    @property
    def address(self) -> int:
        return self._address

    @property
    def size_bytes(self) -> int:
        return math.prod(self._shape) * self._dtype.numpy.itemsize

    def __getitem__(self, index: int | slice) -> DeviceBuffer:
        """Return a view along the first axis: same memory, no copy.

        Raises:
            EngineError: If the index is out of range, or skips rows.
        """
        if not self._shape or (isinstance(index, int) and not -self._shape[0] <= index < self._shape[0]):
            raise EngineError(f"Index {index} is outside a buffer of shape {self._shape}.")
        rows = range(self._shape[0])[index]
        if isinstance(rows, int):
            return self._view(rows, self._shape[1:])
        if rows.step != 1 and len(rows) > 1:
            raise EngineError(
                f"A buffer must be dense and row-major, got step {rows.step} for shape {self._shape}. "
                "Take views along the first axis, with step 1."
            )
        return self._view(rows.start, (len(rows), *self._shape[1:]))

    def _view(self, row: int, shape: tuple[int, ...]) -> DeviceBuffer:
        row_bytes = math.prod(self._shape[1:]) * self._dtype.numpy.itemsize
        return DeviceBuffer(self._device, self._memory, shape, self._dtype, address=self._address + row * row_bytes)

    def write(self, values: NDArray[np.generic]) -> None:
        """Copy host values in, in the stream's order. The host doesn't wait, and `values` may change at once.

        Raises:
            EngineError: If shape or dtype differ: nothing is cast or broadcast silently.
        """
        if values.shape != self._shape or values.dtype != self._dtype.numpy:
            raise EngineError(
                f"A buffer of shape {self._shape}, {self._dtype.value} can't take values of shape {values.shape}, "
                f"{values.dtype}. Cast and reshape them first."
            )
        self._device.make_current()
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with self._device.errors("A copy to the GPU failed"):
            for start in range(0, len(flat), CHUNK_BYTES):
                self._write_chunk(self._address + start, flat[start : start + CHUNK_BYTES])

    def _write_chunk(self, address: int, chunk: NDArray[np.uint8]) -> None:
        blocks = self._device.pinned
        block = blocks.take(len(chunk))
        block.array[: len(chunk)] = chunk
        self._device.copy(address, block.address, len(chunk))
        blocks.mark(block)
        blocks.queue(block)

    def copy_from(self, other: Buffer) -> None:
        """Copy another buffer of the same device, shape and dtype into this one, in the stream's order.

        Raises:
            EngineError: If shape, dtype or device differ.
        """
        source = device_buffer(other, self._device)
        if source.shape != self._shape or source.dtype is not self._dtype:
            raise EngineError(
                f"A buffer of shape {self._shape}, {self._dtype.value} can't take one of shape {source.shape}, "
                f"{source.dtype.value}."
            )
        self._device.make_current()  # the caller's thread may be one that has launched nothing yet
        with self._device.errors("A copy on the GPU failed"):
            self._device.copy(self._address, source.address, self.size_bytes)

    def read(self) -> NDArray[np.generic]:
        """Return a host copy; waits for everything that was put on the stream.

        Raises:
            EngineError: If earlier work failed: a GPU reports that only here.
        """
        pending = PendingRead(self)
        self._device.synchronize()
        return pending.finished()

    def read_later(self) -> Callable[[], NDArray[np.generic]]:
        """Queue a host copy of what the work so far leaves here; what is returned waits for it alone, and gives it.

        Raises:
            EngineError: If earlier work failed, also when the copy is asked for.
        """
        return PendingRead(self)


class PendingRead:
    """A host copy that is on its way into pinned memory; call it for the values."""

    def __init__(self, buffer: DeviceBuffer) -> None:
        self._device = buffer.device
        self._block: PinnedBlock | None = None
        self._device.make_current()
        with self._device.errors("A copy from the GPU failed"):
            block = self._device.pinned.take(buffer.size_bytes)
            self._device.copy(block.address, buffer.address, buffer.size_bytes)
            self._event = self._device.pinned.mark(block)
        self._block = block
        self._values = block.array[: buffer.size_bytes].view(buffer.dtype.numpy).reshape(buffer.shape)

    def __call__(self) -> NDArray[np.generic]:
        """Return the values; a second call returns the same array.

        Raises:
            EngineError: If earlier work failed.
        """
        if self._block is not None:
            self._device.wait(self._event)
        return self.finished()

    def finished(self) -> NDArray[np.generic]:
        """Return the values of a copy that is known to be done."""
        if self._block is not None:
            self._values = self._values.copy()
            self._device.pinned.free(self._block)
            self._block = None
        return self._values

    def __del__(self) -> None:
        """Give the block back behind its copy, if nobody asked for the values."""
        if self._block is not None:
            self._device.pinned.queue(self._block)


def device_buffer(buffer: Buffer, device: Device) -> DeviceBuffer:
    """Return `buffer` as one of this device.

    Raises:
        EngineError: If it is in the host's memory, or was allocated by another device object.
    """
    if not isinstance(buffer, DeviceBuffer) or buffer.device is not device:
        raise EngineError(
            f"Expected a buffer of {device}, got a {type(buffer).__name__}"
            f"{f' of {buffer.device}' if isinstance(buffer, DeviceBuffer) else ''}. Allocate it with that backend."
        )
    return buffer
