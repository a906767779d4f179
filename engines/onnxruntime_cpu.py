"""ONNX Runtime on the CPU. Nothing is compiled ahead: the artefact is the ONNX file, optimised when it is opened.

A model is a chain of sessions, one for each part, so what sessions do not share is paid a dozen times over:

- Threads don't spin between launches (`session.intra_op.allow_spinning = 0`): each session has its own pool, and the
  pools of waiting sessions would take the cores from the running one (1.7 times the time of a monolithic graph).
- All sessions take their activations from one arena (`session.use_env_allocators`): parts run one after another, so
  the process holds the largest part's activations instead of the sum over parts. Memory patterns are off: a planned
  pattern is one chunk that holds tensors which never live together.
- Weights lie in an external file that ONNX Runtime maps; it repacks matrices once, and drops the mapping of those.

Resident after running twelve DiT-S/2-like blocks (127 MB of weights, 16 rows; 58 MB before the first session): with an
arena per session 2 395 MB, and 1 411 MB without patterns; with one arena 400 MB, and 312 MB without patterns, at the
same speed. With no arena at all 655 MB at the peak, and slower; prepacking off saves nothing and is slower.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_native

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec, TensorSpec
from adacorr_deploy.engines.backend import Artefact, Buffer
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.host_backend import HostBackend
from adacorr_deploy.engines.host_memory import host_array

_PROVIDERS: Final = ["CPUExecutionProvider"]
_ONNX_TYPES: Final[Mapping[DType, str]] = {
    DType.FLOAT32: "tensor(float)",
    DType.FLOAT16: "tensor(float16)",
    DType.BFLOAT16: "tensor(bfloat16)",
    DType.INT64: "tensor(int64)",
}
LOG_FATAL_ONLY: Final = 4  # ONNX Runtime's severity levels: 2 warning, 3 error, which come as exceptions too
Provider = str | tuple[str, Mapping[str, str]]  # a name, or a name and its options
# Arguments of `IOBinding.bind_input` and `bind_output`: name, kind of memory, device, element type, shape, address.
Place = tuple[str, str, int, type | int, tuple[int, ...], int]
# ONNX Runtime's exceptions have no common base of their own.
_ORT_ERRORS: Final[tuple[type[Exception], ...]] = (
    *(kind for kind in vars(ort_native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    MemoryError,
    RuntimeError,
    ValueError,
)


class OnnxRuntimeBackend(HostBackend):
    """Builds and opens parts for the CPU."""

    name: Final = "onnxruntime"
    precisions: Final = frozenset({DType.FLOAT32, DType.FLOAT16})  # its CPU kernels know no bfloat16

    def __init__(self, *, threads: int = 0) -> None:
        """Take a number of threads per launch; 0 means one per physical core that the process may use."""
        if threads < 0:
            raise EngineError(f"The number of threads must be 0 (all cores) or more, got {threads}.")
        self.threads: Final = threads

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        """Check that ONNX Runtime takes the part, and return the ONNX file itself: nothing is compiled.

        Raises:
            EngineError: With ONNX Runtime's reason, or the difference between the file and its spec.
        """
        artefact = Artefact(path=onnx_path)
        self.open(artefact, spec).close()
        return artefact

    def open(self, artefact: Artefact, spec: PartSpec) -> OnnxRuntimeSession:
        """Open a part.

        Raises:
            EngineError: If the file is missing, corrupt, needs what this version lacks, or has other tensors.
        """
        return OnnxRuntimeSession(spec, inference_session(artefact, spec, self._options(), _PROVIDERS), _place)

    def _options(self) -> ort.SessionOptions:
        _register_shared_arena()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False
        options.log_severity_level = LOG_FATAL_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.use_env_allocators", "1")
        return options


class _RawPath(os.PathLike[bytes]):
    """A path as the bytes that it is on the disk: ONNX Runtime takes a string for UTF-8, which a path need not be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self._path)


class OnnxRuntimeSession:
    """An opened part; any number of bindings of it may be alive at once, for the same or other axis sizes."""

    def __init__(
        self,
        spec: PartSpec,
        session: ort.InferenceSession,
        place: Callable[[TensorSpec, Buffer], Place],
        run_options: ort.RunOptions | None = None,
    ) -> None:
        """Take an open session, and what says where a buffer is; the latter refuses buffers of other backends."""
        self.spec = spec
        self._session: ort.InferenceSession | None = session
        self._place = place
        self._run_options = run_options
        self.launches = 0

    def bind(self, buffers: Mapping[str, Buffer]) -> OnnxRuntimeLaunch:
        """Bind every input and output by address.

        Raises:
            EngineError: If a tensor is missing, doesn't fit, or an output overlaps another tensor.
        """
        check_binding(self.spec, buffers)
        binding = self._open_session().io_binding()
        with _engine_errors(f"{self.spec.name}: ONNX Runtime refused a buffer"):
            for tensor in self.spec.inputs:
                binding.bind_input(*self._place(tensor, buffers[tensor.name]))
            for tensor in self.spec.outputs:
                binding.bind_output(*self._place(tensor, buffers[tensor.name]))
        return OnnxRuntimeLaunch(self, binding, tuple(buffers.values()))

    def run(self, binding: ort.IOBinding) -> None:
        """Run the engine over a binding and count it; `OnnxRuntimeLaunch.run` is the way in.

        Raises:
            EngineError: If the engine fails, or the session is closed.
        """
        session = self._open_session()
        try:  # not `_engine_errors`: this is the one hot line of the backend
            session.run_with_iobinding(binding, self._run_options)
        except _ORT_ERRORS as error:
            raise EngineError(f"{self.spec.name}: the engine failed while running: {error}") from error
        self.launches += 1

    def close(self) -> None:
        """Give the session up; its weights are freed with the last launch that refers to it."""
        self._session = None

    def _open_session(self) -> ort.InferenceSession:
        if self._session is None:
            raise EngineError(f"{self.spec.name}: the session is closed. Open the bundle again.")
        return self._session


class OnnxRuntimeLaunch:
    """A part bound to its buffers, which it keeps alive: the engine holds bare addresses."""

    __slots__ = ("_binding", "_buffers", "_session")

    def __init__(self, session: OnnxRuntimeSession, binding: ort.IOBinding, buffers: tuple[Buffer, ...]) -> None:
        self._session = session
        self._binding = binding
        self._buffers = buffers

    def run(self) -> None:
        """Run the engine once over the bound buffers.

        Raises:
            EngineError: If the engine fails; the message names the part.
        """
        self._session.run(self._binding)


@functools.cache
def _register_shared_arena() -> None:
    """Give the process one arena for the activations of all sessions; it can be registered only once."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    defaults = ort.OrtArenaCfg(0, -1, -1, -1)  # no limit; ONNX Runtime's own growth, first chunk and slack
    with _engine_errors("ONNX Runtime refused a shared memory arena"):
        ort.create_and_register_allocator(memory, defaults)


@contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    try:
        yield
    except _ORT_ERRORS as error:
        raise EngineError(f"{what}: {error}") from error


def _place(tensor: TensorSpec, buffer: Buffer) -> Place:
    array = host_array(buffer)
    return tensor.name, "cpu", 0, array.dtype.type, array.shape, buffer.address


def inference_session(
    artefact: Artefact, spec: PartSpec, options: ort.SessionOptions, providers: Sequence[Provider]
) -> ort.InferenceSession:
    """Open an ONNX file, and compare its tensors with the part's spec.

    Raises:
        EngineError: If the file is missing, corrupt, needs what this version lacks, or has other tensors.
    """
    path = artefact.path
    if not path.is_file():
        raise EngineError(f"{spec.name}: there is no file {path}. Build the bundle again with adacorr-build.")
    with _engine_errors(f"{spec.name}: ONNX Runtime {ort.__version__} can't open {path}"):
        session = ort.InferenceSession(_RawPath(path), options, providers=list(providers), enable_fallback=False)
    _check_tensors(spec, spec.inputs, session.get_inputs(), "input")
    _check_tensors(spec, spec.outputs, session.get_outputs(), "output")
    return session


def _check_tensors(spec: PartSpec, expected: tuple[TensorSpec, ...], found: list[ort.NodeArg], kind: str) -> None:
    """Compare a file's inputs or outputs with the spec, which is what buffers are allocated from."""
    actual = {node.name: node for node in found}
    if set(actual) != {tensor.name for tensor in expected}:
        names = ", ".join(tensor.name for tensor in expected)
        raise EngineError(f"{spec.name}: the {kind}s of the ONNX file are {', '.join(actual)}, its spec says {names}.")
    for tensor in expected:
        node = actual[tensor.name]
        if node.type != _ONNX_TYPES[tensor.dtype] or not _shapes_agree(tensor.shape, node.shape):
            raise EngineError(
                f"{spec.name}: {kind} {tensor.name} of the ONNX file is {node.type} {node.shape}, "
                f"its spec says {tensor.dtype.value} {list(tensor.shape)}. Build the bundle again with adacorr-build."
            )


def _shapes_agree(expected: tuple[int | str, ...], found: list[int | str | None]) -> bool:
    """Whether no fixed size contradicts; ONNX Runtime calls axes that it couldn't infer what it likes."""
    if len(expected) != len(found):
        return False
    fixed = ((a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, int) and isinstance(b, int))
    return all(a == b for a, b in fixed)
