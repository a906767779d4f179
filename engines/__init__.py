"""Engine backends: each builds a part's ONNX file into an artefact and opens it as a session over fixed buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from adacorr_deploy.core.engine_build import CompilerOptions
from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.engines.backend import Artefact, Backend, Buffer, Launch, Session

__all__ = [
    # The table
    "BACKENDS",
    # The protocol
    "Artefact",
    "Backend",
    "Buffer",
    "Launch",
    "Session",
    # Its way in
    "backend_by_name",
]


def _onnxruntime(options: CompilerOptions | None) -> Backend:
    _compiles_nothing("onnxruntime", options)
    with _installed_by("onnxruntime", extra="cpu"):
        from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
    return OnnxRuntimeBackend()


def _onnxruntime_cuda(options: CompilerOptions | None) -> Backend:
    _compiles_nothing("onnxruntime-cuda", options)
    with _installed_by("onnxruntime-cuda", extra="gpu"):
        from adacorr_deploy.engines.onnxruntime_cuda import OnnxRuntimeCudaBackend
    return OnnxRuntimeCudaBackend()


def _tensorrt(options: CompilerOptions | None) -> Backend:
    from adacorr_deploy.engines.tensorrt_backend import TensorRTBackend
    from adacorr_deploy.engines.tensorrt_modules import TENSORRT

    return TensorRTBackend(TENSORRT, options)


def _tensorrt_rtx(options: CompilerOptions | None) -> Backend:
    from adacorr_deploy.engines.tensorrt_backend import TensorRTBackend
    from adacorr_deploy.engines.tensorrt_modules import TENSORRT_RTX

    return TensorRTBackend(TENSORRT_RTX, options)


def _compiles_nothing(backend: str, options: CompilerOptions | None) -> None:
    if options is not None:
        raise EngineError(
            f"Backend {backend} compiles nothing: it opens ONNX files as they are. Leave the options of compiled "
            "engines out, or choose --backend tensorrt-rtx or tensorrt."
        )


@contextmanager
def _installed_by(backend: str, *, extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise BackendUnavailableError(
            f"Backend {backend} can't be loaded ({error}). Install it with: pip install 'adacorr-deploy[{extra}]'"
        ) from error


# Each factory imports what its backend needs, and no other's.
BACKENDS: Final[Mapping[str, Callable[[CompilerOptions | None], Backend]]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}


def backend_by_name(name: str, options: CompilerOptions | None = None) -> Backend:
    """Return a new backend.

    Args:
        name: A key of `BACKENDS`.
        options: How it compiles, for a build.

    Raises:
        BackendUnavailableError: If the name is unknown, or the backend's packages or hardware are not here.
        EngineError: If it can't do what the options ask, or compiles nothing and was given some.
    """
    if name not in BACKENDS:
        raise BackendUnavailableError(f"There is no backend called {name!r}. Known: {', '.join(BACKENDS)}.")
    return BACKENDS[name](options)
