"""The manifest of a bundle: what it holds, from what it was made, and the hash of every file.

A manifest is untrusted: it is validated field by field before anything is opened, and its paths can't leave the bundle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.core.errors import BundleError, SchedulerError
from adacorr_deploy.core.samplers import NoiseSchedule
from adacorr_deploy.core.specs import ModelSpec, PartSpec

SCHEMA_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"


def bundle_path(path: str) -> str:
    """Return `path` if it is relative and can't leave the bundle; raise ValueError if it is not."""
    parts = PurePosixPath(path).parts
    # Backslashes and colons are separators and drives on Windows; control characters make the file system raise.
    if not parts or path.startswith("/") or ".." in parts or any(c in "\\:" or not c.isprintable() for c in path):
        raise ValueError(f"{path!r} is not a path inside the bundle")
    return path


BundlePath = Annotated[str, AfterValidator(bundle_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PRESET_PATTERN: Final = r"^[a-z][a-z-]*(@[0-9.]+)?$"  # no path: a bundle names no policy file outside itself
PresetName = Annotated[str, Field(pattern=PRESET_PATTERN)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Frozen):
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]


class PartRecord(_Frozen):
    """A part's ONNX file and what the backend made of it (the same path where the backend opens ONNX itself)."""

    spec: PartSpec
    onnx: BundlePath
    artefact: BundlePath
    build_seconds: Annotated[float, Field(ge=0)]


class Manifest(_Frozen):
    """Everything the runtime needs to open a bundle."""

    schema_version: int
    model_name: str
    model: ModelSpec
    checkpoint_sha256: Sha256
    schedule: NoiseSchedule
    backend: str
    parts: dict[str, PartRecord]
    files: dict[BundlePath, FileRecord]
    tool_versions: dict[str, str]
    class_names: tuple[str, ...] | None = None
    default_policy: PresetName = "robust"  # of a run that names none


def manifest_from_json(text: str, *, where: str) -> Manifest:
    """Parse and validate a manifest.

    Args:
        text: Content of `manifest.json`.
        where: The bundle's path, for the messages.

    Raises:
        BundleError: If it is not JSON, of another schema version, or any field is not valid.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{where}: {MANIFEST_NAME} is not JSON ({error}). Rebuild the bundle with adacorr-build."
        ) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):  # True == 1
        raise BundleError(
            f"{where}: schema version {version!r}, this release reads {SCHEMA_VERSION}. "
            "Rebuild the bundle with adacorr-build."
        )
    try:
        return Manifest.model_validate_json(text)
    except SchedulerError as error:
        raise BundleError(
            f"{where}: {MANIFEST_NAME}: schedule: {error} Rebuild the bundle with adacorr-build."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"])
        raise BundleError(
            f"{where}: {MANIFEST_NAME}: {field}: {first['msg']}. Rebuild the bundle with adacorr-build."
        ) from error


def file_record(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a file, read once in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
