"""Page-locked host memory, through which every copy between the host and a GPU goes.

A copy from ordinary memory may first wait for all earlier work of its stream (the driver stages it), which would stall
the loop once per written scalar. So a write copies its values into a pinned block, queues the copy from there, and
returns: the caller's array is its own again. A block is used anew once the event behind its copy has passed.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.engines.cuda_core import CudaEvent, CudaMemory, CudaMemoryResource, CudaStream

CHUNK_BYTES: Final = 4 << 20  # larger writes go in pieces of this, so that weights don't pin as much again
_SMALLEST_BYTES: Final = 256
_KEPT_BYTES: Final = 16 << 20  # a larger block, which only a large read takes, is unpinned after use
_QUEUED_BYTES: Final = 32 << 20  # beyond this a write waits for the oldest queued one


@dataclass(slots=True)
class PinnedBlock:
    """Some pinned memory; while it is in use, `event` marks the place behind the copy from or to it."""

    memory: CudaMemory
    array: NDArray[np.uint8]
    event: CudaEvent | None = None

    @property
    def address(self) -> int:
        return int(self.memory.handle)


class PinnedBlocks:
    """The pinned blocks of one stream. They are used again and again: pinning anew would stall the GPU each time."""

    def __init__(self, resource: CudaMemoryResource, stream: CudaStream) -> None:
        self._resource = resource
        self._stream = stream
        self._free: dict[int, list[PinnedBlock]] = {}
        self._queued: deque[PinnedBlock] = deque()  # in the order of their copies
        self._queued_bytes = 0
        self._closed = False
        self.waits = 0  # how often a block had to be waited for

    def take(self, size_bytes: int) -> PinnedBlock:
        """Return a block of at least so many bytes that no copy uses.

        Raises:
            CUDAError: Of cuda.core, if no more memory can be pinned.
        """
        self._collect()
        capacity = max(_SMALLEST_BYTES, 1 << (size_bytes - 1).bit_length()) if size_bytes else _SMALLEST_BYTES
        if blocks := self._free.get(capacity):
            return blocks.pop()
        memory = self._resource.allocate(capacity, stream=self._stream)
        view = (ctypes.c_uint8 * capacity).from_address(int(memory.handle))
        return PinnedBlock(memory, np.ctypeslib.as_array(view))

    def mark(self, block: PinnedBlock) -> CudaEvent:
        """Note that the last thing put on the stream is the copy of this block."""
        block.event = self._stream.record(block.event)
        return block.event

    def queue(self, block: PinnedBlock) -> None:
        """Give back a block whose copy is queued and marked; it is used again when the copy is done."""
        if self._closed:  # which waited for every copy
            self.free(block)
            return
        self._queued.append(block)
        self._queued_bytes += len(block.array)

    def free(self, block: PinnedBlock) -> None:
        """Give back a block whose copy is done."""
        if self._closed or len(block.array) > _KEPT_BYTES:
            block.memory.close()
        else:
            self._free.setdefault(len(block.array), []).append(block)

    def close(self) -> None:
        """Unpin everything that is given back, now and later. The stream must be idle."""
        self._closed = True
        for block in (*self._queued, *(block for blocks in self._free.values() for block in blocks)):
            self.free(block)
        self._queued.clear()
        self._free.clear()
        self._queued_bytes = 0

    def _collect(self) -> None:
        while self._queued:
            event = self._queued[0].event
            if event is not None and not event.is_done:
                if self._queued_bytes <= _QUEUED_BYTES:
                    return
                event.sync()
                self.waits += 1
            block = self._queued.popleft()
            self._queued_bytes -= len(block.array)
            self.free(block)
