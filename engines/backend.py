"""The backend protocol: what the runtime may ask of ONNX Runtime, TensorRT or the PyTorch reference, and nothing more.

A buffer has one address for life. A session is bound to buffers once, and the launch that results is run many times:
no tensor is copied between parts, since one part's output buffer is the next one's input buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.specs import DType, PartSpec


class Buffer(Protocol):
    """A dense, row-major tensor in a backend's memory; its address never changes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> DType: ...

    @property
    def address(self) -> int: ...

    def __getitem__(self, index: int | slice) -> Buffer:
        """Return a view along the first axis: same memory, no copy."""
        ...

    def write(self, values: NDArray[np.generic]) -> None:
        """Copy host values of the same shape and dtype into the buffer."""
        ...

    def copy_from(self, other: Buffer) -> None:
        """Copy another buffer of the same backend, shape and dtype into this one."""
        ...

    def read(self) -> NDArray[np.generic]:
        """Return a host copy, complete when the call returns."""
        ...


class Launch(Protocol):
    """A session bound to its buffers."""

    def run(self) -> None:
        """Run the engine once over the bound buffers.

        Raises:
            EngineError: If the engine fails; the message names the part.
        """
        ...


class Session(Protocol):
    """An opened engine."""

    @property
    def spec(self) -> PartSpec: ...

    @property
    def launches(self) -> int:
        """How often an engine of this session was really run since it was opened."""
        ...

    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        """Bind every input and output by address.

        Raises:
            EngineError: If a tensor is missing, or a shape or dtype doesn't fit the spec.
        """
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """Builds and opens engines. One instance serves one process."""

    @property
    def name(self) -> str: ...

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Path:
        """Compile a part and return the artefact's path (which may be `onnx_path` itself where nothing is compiled).

        Raises:
            EngineError: If the part doesn't compile; nothing half-written is left.
        """
        ...

    def open(self, artefact: Path, spec: PartSpec) -> Session:
        """Open an artefact that `build` made.

        Raises:
            EngineError: If it can't be opened here.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return a zeroed buffer, 64-byte aligned."""
        ...

    def synchronize(self) -> None:
        """Return when every launch so far has finished."""
        ...
