"""A bundle on disk: opened only after every file was checked, and changed only by writing beside and renaming."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    bundle_path,
    file_record,
    manifest_from_json,
)

PARTS_DIR: Final = "parts"  # ONNX files with their weights beside them (ONNX external data may not leave its folder)
CALIBRATION_DIR: Final = "calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: Manifest

    def file(self, relative: str) -> Path:
        return self.path / relative


def open_bundle(path: Path) -> Bundle:
    """Open a bundle after checking its manifest and the hash of every file.

    Raises:
        BundleError: If the folder is no bundle, a file is missing or altered, or a path leaves the bundle.
    """
    manifest_path = path / MANIFEST_NAME
    try:
        text = manifest_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path} is not a bundle: its {MANIFEST_NAME} can't be read ({error}). "
            f"Make one with: adacorr-build MODEL -o {path}"
        ) from error
    manifest = manifest_from_json(text, where=str(path))
    for relative, record in manifest.files.items():
        try:
            fault = _fault(path, relative, record)
        except (
            OSError,
            RuntimeError,
        ) as error:  # unreadable, a name too long, a loop of links
            fault = f"can't be read ({error})"
        if fault:
            raise BundleError(f"{path}: {relative} {fault}. Rebuild the bundle with adacorr-build.")
    used = {name for part in manifest.parts.values() for name in (part.onnx, part.artefact)}
    if unlisted := sorted(used - manifest.files.keys()):
        raise BundleError(f"{path}: {unlisted[0]} is used by a part but has no hash. Rebuild it with adacorr-build.")
    return Bundle(path=path, manifest=manifest)


def _fault(path: Path, relative: str, record: FileRecord) -> str | None:
    """Return what is wrong with one file of a bundle, or None."""
    file = path / relative
    if not file.resolve().is_relative_to(path.resolve()):
        return "leads outside the bundle"
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != record.size_bytes or file_record(file) != record:
        return "was altered (its SHA-256 differs from the manifest's)"
    return None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def store_in_bundle(bundle: Bundle, relative: str, content: bytes) -> Bundle:
    """Add or replace one file of a bundle, with its hash; the manifest is written last.

    If the manifest can't be written, or the user interrupts, the file is put back: the bundle still opens.

    Raises:
        BundleError: If `relative` leaves the bundle, or the bundle can't be written.
    """
    try:
        target = bundle.file(bundle_path(relative))
        if not target.parent.resolve().is_relative_to(bundle.path.resolve()):
            raise ValueError(f"{relative!r} is not a path inside the bundle")
    except ValueError as error:
        raise BundleError(f"{bundle.path}: {error}. Name a file below the bundle's folder.") from error
    try:
        target.parent.mkdir(exist_ok=True)
        before = target.read_bytes() if target.exists() else None
        try:
            replace_file(target, content)
            files = {**bundle.manifest.files, relative: file_record(target)}
            manifest = bundle.manifest.model_copy(update={"files": files})
            replace_file(bundle.path / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
        except BaseException:
            _put_back(target, before)
            raise
    except OSError as error:
        raise BundleError(
            f"{bundle.path} can't be written: {error}. Check the disk and the folder's permissions."
        ) from error
    return Bundle(path=bundle.path, manifest=manifest)


def _put_back(target: Path, before: bytes | None) -> None:
    if before is None:
        target.unlink(missing_ok=True)
    elif target.read_bytes() != before:
        replace_file(target, before)
