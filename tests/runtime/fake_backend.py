"""A backend whose engines are Python functions. It is strict: bindings are checked, no part may overwrite its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec
from adacorr_deploy.engines.backend import Artefact, Buffer, Launch
from adacorr_deploy.engines.decision_graphs import no_decisions
from tests.runtime.tiny_dit import Part, TinyDiT


class FakeBuffer:
    def __init__(self, values: NDArray[np.generic]) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> DType:
        return DType.from_numpy(self.values.dtype)

    @property
    def address(self) -> int:
        return int(self.values.__array_interface__["data"][0])

    def __getitem__(self, index: int | slice) -> FakeBuffer:
        return FakeBuffer(self.values[index])

    def write(self, values: NDArray[np.generic]) -> None:
        assert (values.shape, values.dtype) == (self.values.shape, self.values.dtype)
        self.values[...] = values

    def copy_from(self, other: Buffer) -> None:
        assert isinstance(other, FakeBuffer)
        self.write(other.values)

    def read(self) -> NDArray[np.generic]:
        return self.values.copy()

    def read_later(self) -> Callable[[], NDArray[np.generic]]:
        copy = self.read()
        return lambda: copy


class FakeSession:
    def __init__(self, spec: PartSpec, function: Part, backend: FakeBackend) -> None:
        self.spec = spec
        self.function = function
        self.backend = backend
        self.launches = 0
        self.closed = False

    def bind(self, buffers: Mapping[str, Buffer]) -> FakeLaunch:
        tensors = {spec.name: spec for spec in (*self.spec.inputs, *self.spec.outputs)}
        assert buffers.keys() == tensors.keys(), f"{self.spec.name}: {buffers.keys() ^ tensors.keys()}"
        sizes: dict[str, int] = {}
        arrays = {}
        for name, buffer in buffers.items():
            assert isinstance(buffer, FakeBuffer)
            assert buffer.dtype is tensors[name].dtype
            assert len(buffer.shape) == len(tensors[name].shape), f"{self.spec.name}: {name} {buffer.shape}"
            for size, dim in zip(buffer.shape, tensors[name].shape, strict=True):
                expected = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
                assert size == expected, f"{self.spec.name}: {name} {buffer.shape}, not {tensors[name].shape}"
            arrays[name] = buffer.values
        outputs = [spec.name for spec in self.spec.outputs]
        for output in outputs:
            clashing = [name for name in arrays if name != output and np.shares_memory(arrays[name], arrays[output])]
            assert not clashing, f"{self.spec.name}: {output} overwrites {clashing}"
        self.backend.bindings.append((self.spec.name, {name: buffer.address for name, buffer in buffers.items()}))
        return FakeLaunch(self, arrays, outputs)

    def close(self) -> None:
        self.closed = True


class FakeLaunch:
    def __init__(self, session: FakeSession, arrays: dict[str, NDArray[np.generic]], outputs: list[str]) -> None:
        self.session = session
        self.arrays = arrays
        self.outputs = outputs

    def run(self) -> None:
        backend = self.session.backend
        backend.before_launch(self.session.spec.name)
        inputs = {name: values.copy() for name, values in self.arrays.items() if name not in self.outputs}
        results = self.session.function(inputs)
        for name in self.outputs:
            self.arrays[name][...] = results[name]
        self.session.launches += 1
        backend.order.append(self.session.spec.name)


class FakeBackend:
    """Opens the parts of a `TinyDiT`, and remembers what was launched, bound and allocated."""

    name = "fake"
    precisions = frozenset(DType)
    hardware = "CPU"
    opens_onnx = True
    engine_build = None

    def __init__(self, functions: Mapping[str, Part]) -> None:
        self.functions = functions
        self.sessions: dict[str, FakeSession] = {}
        self.order: list[str] = []  # parts in the order of their launches
        self.bindings: list[tuple[str, dict[str, int]]] = []
        self.buffers: list[FakeBuffer] = []
        self.before_launch: Callable[[str], None] = lambda part: None

    @classmethod
    def of(cls, model: TinyDiT) -> FakeBackend:
        return cls({name: function for name, (_, function) in model.parts().items()})

    def for_model(self, model: ModelSpec) -> None:
        """Take note of nothing: parts run at any size."""

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        return Artefact(path=onnx_path)

    def is_available(self) -> bool:
        """Return True: a CPU is."""
        return True

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Python functions run anywhere."""

    def open(self, artefact: Artefact, spec: PartSpec) -> FakeSession:
        if artefact.path.read_text() != spec.name:
            raise EngineError(f"{artefact.path} is not {spec.name}")
        session = self.sessions[spec.name] = FakeSession(spec, self.functions[spec.name], self)
        return session

    def open_noise(self, spec: PartSpec) -> None:
        """Return None: buffers are in the host's memory."""

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> FakeBuffer:
        buffer = FakeBuffer(np.zeros(shape, dtype.numpy))
        self.buffers.append(buffer)
        return buffer

    def synchronize(self) -> None:
        """Python functions are done when they return."""

    def close(self) -> None:
        """Return at once: buffers and sessions hold what there is."""

    def fuse(self, launches: Sequence[Launch]) -> None:
        """Return None: there is nothing to save."""

    def decision_graphs(self) -> NoReturn:
        raise no_decisions(self.name, "it runs on the CPU")
