"""Opening the parts of a bundle with a backend: its own, or any that takes ONNX files as they are."""

from __future__ import annotations

from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Artefact, Backend, Session


def check_backend(bundle: Bundle, backend: Backend) -> None:
    """Refuse a backend that can't open a bundle, before its first part is opened.

    Raises:
        EngineError: If the bundle has no engines for the backend, or the backend can't run this precision or these
            engines on this machine.
    """
    manifest = bundle.manifest
    check_precision(manifest.model.precision, backend)
    if backend.opens_onnx:
        return
    if backend.name != manifest.backend:
        raise EngineError(
            f"{bundle.path} holds no engines for backend {backend.name}: it was built for {manifest.backend}. "
            f"Rebuild it with: adacorr-build MODEL -o {bundle.path} --overwrite --backend {backend.name}"
        )
    backend.check_compatible(manifest.engine_build)


def check_precision(precision: DType, backend: Backend) -> None:
    """Refuse a backend that doesn't run models of a precision.

    Raises:
        EngineError: If it doesn't; the message says which it runs.
    """
    if precision not in backend.precisions:
        known = ", ".join(sorted(each.value for each in backend.precisions))
        raise EngineError(
            f"Backend {backend.name} runs no {precision.value} models, only {known}. Choose another --backend, or "
            "build with another --precision."
        )


def open_part(bundle: Bundle, name: str, backend: Backend) -> Session:
    """Open a part of a bundle, after `check_backend`.

    Raises:
        EngineError: If it can't be opened here.
    """
    part = bundle.manifest.parts[name]
    if backend.name != bundle.manifest.backend:  # one that opens any bundle's ONNX files
        return backend.open(Artefact(path=bundle.file(part.onnx)), part.spec)
    weights = bundle.file(part.weights) if part.weights is not None else None
    return backend.open(Artefact(path=bundle.file(part.artefact), weights=weights), part.spec)
