"""The backend protocol: what the runtime may ask of ONNX Runtime, TensorRT or the PyTorch reference, and nothing more.

A buffer has one address for life. A session is bound to buffers once, and the launch that results is run many times:
no tensor is copied between parts, since one part's output buffer is the next one's input buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec
from adacorr_deploy.engines.decision_graphs import DecisionGraphs


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What a backend made of a part.

    Attributes:
        path: The file that `Backend.open` takes; parts of one structure may share it.
        weights: Safetensors file whose tensors are further inputs of the engine; None where `path` has them.
    """

    path: Path
    weights: Path | None = None


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

    def read_later(self) -> Callable[[], NDArray[np.generic]]:
        """Start a host copy of what the launches so far leave here; what is returned waits for it and gives it.

        On a GPU the copy is queued like a launch: neither the host nor the launches after it wait. Whoever asks for it
        later, when the GPU has gone on to other work, stalls nothing.
        """
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

    @property
    def precisions(self) -> frozenset[DType]:
        """Of models that the backend runs."""
        ...

    @property
    def hardware(self) -> str:
        """What engines run on, for messages: `CPU`, or the GPU's number, name and architecture."""
        ...

    @property
    def opens_onnx(self) -> bool:
        """Whether `open` takes a part's ONNX file as it is, of a bundle that was built for any backend."""
        ...

    @property
    def engine_build(self) -> EngineBuild | None:
        """How `build` compiles; None where it compiles nothing."""
        ...

    def for_model(self, model: ModelSpec) -> None:
        """Say of which model the parts are that are built next; a backend that takes any size needs not know.

        Raises:
            RequestError: If the engines are to be compiled for sizes that its latents can't have.
        """
        ...

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        """Compile a part (where nothing is compiled, the artefact is `onnx_path` itself).

        Raises:
            EngineError: If the part doesn't compile.
            OSError: If the artefact can't be written; use a folder that is given up then.
        """
        ...

    def is_available(self) -> bool:
        """Whether the hardware that engines run on is here: compiling may need none."""
        ...

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Refuse engines that this machine can't run, before the first is opened.

        Raises:
            EngineError: Saying what was found, what is needed, and how to rebuild.
        """
        ...

    def open(self, artefact: Artefact, spec: PartSpec) -> Session:
        """Open an artefact that `build` made.

        Raises:
            EngineError: If it can't be opened here.
        """
        ...

    def open_noise(self, spec: PartSpec) -> Session | None:
        """Return what makes a request's normals in this backend's memory (`plugins.kernels.noise_spec`), or None.

        Ask when the bundle's parts are open. Without it, the host makes the same ones and writes them.
        """
        ...

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """Return a zeroed buffer, 64-byte aligned."""
        ...

    def synchronize(self) -> None:
        """Return when every launch so far has finished."""
        ...

    def close(self) -> None:
        """Give up what the backend holds; its sessions and buffers can't be used any more."""
        ...

    def fuse(self, launches: Sequence[Launch]) -> Launch | None:
        """Return one launch that runs these in order, each counted by its session, or None if that saves nothing.

        On a GPU it is a graph. The launches must have run once each before.
        """
        ...

    def decision_graphs(self) -> DecisionGraphs:
        """Return what makes graphs that decide while they run; ask when the bundle's parts are open.

        Raises:
            EngineError: If this backend, machine or bundle has none; the message says why, and what to do.
        """
        ...
