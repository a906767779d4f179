"""Engine backends: each builds a part's ONNX file into an artefact and opens it as a session over fixed buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from adacorr_deploy.core.errors import BackendUnavailableError
from adacorr_deploy.engines.backend import Backend, Buffer, Launch, Session

__all__ = [
    # The table
    "BACKENDS",
    # The protocol
    "Backend",
    "Buffer",
    "Launch",
    "Session",
    # Its way in
    "backend_by_name",
]


def _onnxruntime() -> Backend:
    try:
        from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
    except ImportError as error:
        raise BackendUnavailableError(
            f"Backend onnxruntime can't be loaded ({error}). Install it with: pip install adacorr-deploy[cpu]"
        ) from error
    return OnnxRuntimeBackend()


# Each factory imports what its backend needs, and no other's.
BACKENDS: Final[Mapping[str, Callable[[], Backend]]] = {
    "onnxruntime": _onnxruntime,
}


def backend_by_name(name: str) -> Backend:
    """Return a new backend.

    Raises:
        BackendUnavailableError: If the name is unknown, or the backend's packages or hardware are not here.
    """
    if name not in BACKENDS:
        raise BackendUnavailableError(f"There is no backend called {name!r}. Known: {', '.join(BACKENDS)}.")
    return BACKENDS[name]()
