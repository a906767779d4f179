"""A bundle on disk: opened only after every file was checked, and changed only by writing beside and renaming."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path, PurePosixPath
from typing import Final

from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.folder_lock import locked
from adacorr_deploy.core.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    bundle_path,
    file_record,
    manifest_from_json,
)
from adacorr_deploy.core.untrusted import bounded_file, clipped

PARTS_DIR: Final = "parts"  # ONNX files with their weights beside them (ONNX external data may not leave its folder)
ENGINES_DIR: Final = "engines"
CALIBRATION_DIR: Final = "calibration"
PROFILE_DIR: Final = "profile"
_ENGINE_DIRS: Final = (PARTS_DIR, ENGINES_DIR)  # what engines read by themselves: these hold nothing that isn't listed
_MAX_MANIFEST_BYTES: Final = 16 << 20
_HASH_DIGITS: Final = 12  # of the SHA-256 that a stored file has in its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle."""

    path: Path
    manifest: Manifest

    def file(self, relative: str) -> Path:
        return self.path / relative


# --- Opening -----------------------------------------------------------------------------------------------------


def open_bundle(path: Path) -> Bundle:
    """Open a bundle after checking its manifest and the hash of every file.

    Raises:
        BundleError: If the folder is no bundle, a file is missing, altered or not listed, or a path leaves the bundle.
    """
    text = _manifest_text(path)
    manifest = manifest_from_json(text, where=str(path))
    fault = next(_faults(path, manifest), None)
    if fault is None:
        return Bundle(path=path, manifest=manifest)
    if _manifest_text(path) != text:  # calibrated or replaced meanwhile, and what it listed is gone
        return open_bundle(path)
    raise BundleError(f"{path}: {fault}. Rebuild the bundle with adacorr-build.")


def is_bundle(path: Path) -> bool:
    """Say whether a folder was made by a build, of whatever version and however damaged."""
    return (path / MANIFEST_NAME).is_file() and (path / PARTS_DIR).is_dir()


def _manifest_text(path: Path) -> str:
    file = path / MANIFEST_NAME
    try:
        if file.is_symlink():
            raise ValueError("it is a link")
        return bounded_file(file, limit_bytes=_MAX_MANIFEST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        free = "NEW.bundle" if os.path.exists(path) else path  # noqa: PTH110  for Path, some names are errors
        raise BundleError(
            f"{path} is not a bundle: its {MANIFEST_NAME} can't be read ({error}). "
            f"Make one with: adacorr-build MODEL -o {free}"
        ) from error


def _faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the files of a bundle."""
    for relative in _used_by_parts(manifest):
        if relative not in manifest.files:
            yield f"{relative} is used by a part but has no hash"
        if not _is_engine_file(relative):
            yield f"{relative} is used by a part but lies outside {' and '.join(_ENGINE_DIRS)}"
    for relative in _engine_files(path):
        if relative not in manifest.files:
            yield f"{clipped(relative)} is not listed in {MANIFEST_NAME}"
    for relative, record in manifest.files.items():
        try:
            fault = _file_fault(path, relative, record)
        except (OSError, RuntimeError) as error:  # unreadable, a name too long, a loop of links
            fault = f"can't be read ({error})"
        if fault:
            yield f"{relative} {fault}"


def _file_fault(path: Path, relative: str, record: FileRecord) -> str | None:
    """Return what is wrong with one listed file, or None."""
    file = path / relative
    if not file.resolve().is_relative_to(path.resolve()):
        return "leads outside the bundle"
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != record.size_bytes or file_record(file) != record:
        return "was altered (its SHA-256 differs from the manifest's)"
    return None


def _used_by_parts(manifest: Manifest) -> list[str]:
    parts = manifest.parts.values()
    return sorted({name for part in parts for name in (part.onnx, part.artefact, part.weights) if name is not None})


def _is_engine_file(relative: str) -> bool:
    return relative.startswith(tuple(f"{folder}/" for folder in _ENGINE_DIRS))


def _engine_files(path: Path) -> Iterator[str]:
    """Yield every file, link and special file that an engine could come upon, such as an ONNX file's external data."""
    unreadable: list[OSError] = []
    for top in _ENGINE_DIRS:
        for folder, folders, files in os.walk(path / top, onerror=unreadable.append):
            linked = [name for name in folders if Path(folder, name).is_symlink()]  # which os.walk doesn't enter
            for name in (*linked, *files):
                yield Path(folder, name).relative_to(path).as_posix()
    # A folder that can't be listed may hold files all the same, and engines can open them by name.
    yield from (Path(error.filename).relative_to(path).as_posix() for error in unreadable if error.errno != ENOENT)


def verified_content(file: Path, sha256: str, *, limit_bytes: int) -> bytes:
    """Return the content of a file that a manifest lists, checked again: the bundle may have been opened long ago.

    Raises:
        BundleError: If the file has gone or was replaced since.
        ValueError: If it is no regular file, or holds more than `limit_bytes`.
    """
    try:
        content = bounded_file(file, limit_bytes=limit_bytes)
    except OSError as error:
        raise BundleError(f"{file} can't be read any more: {error}. Open the bundle again.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BundleError(f"{file} was replaced after its bundle was opened. Open the bundle again.")
    return content


# --- Storing -----------------------------------------------------------------------------------------------------


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:  # never through a link that someone put there
            file.write(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def store_in_bundle(bundle: Bundle, relative: str, content: bytes) -> tuple[Bundle, Path]:
    """Add a file to a bundle, with its hash, in the place of what was stored as `relative` before.

    The file's name gets its content's hash: `calibration/x.json` becomes `calibration/x-012345abcdef.json`. So no
    listed file is ever written over, the bundle changes with the renaming of its manifest alone, and it opens whenever
    the process was killed. What another process stored since `bundle` was opened stays.

    Args:
        bundle: As opened, however long ago.
        relative: Below the bundle, and not below the folders that engines read, which hold nothing unlisted.
        content: Of the file.

    Returns:
        The bundle with the file, and where the file is.

    Raises:
        BundleError: If `relative` leaves the bundle, the bundle was replaced by another one since it was opened, or
            it can't be written.
    """
    path = _inside(bundle, relative)
    record = FileRecord(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    name = str(path.with_name(f"{path.stem}-{record.sha256[:_HASH_DIGITS]}{path.suffix}"))
    try:
        with locked(bundle.path):
            manifest = _current_manifest(bundle)
            replaced = _stored_as(path, manifest.files)
            try:
                bundle.file(name).parent.mkdir(exist_ok=True)
                replace_file(bundle.file(name), content)
                others = {other: manifest.files[other] for other in manifest.files if other not in replaced}
                manifest = manifest.model_copy(update={"files": {**others, name: record}})
                replace_file(bundle.path / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
            finally:
                _remove_unlisted(bundle.path, {name, *replaced})
    except OSError as error:
        raise BundleError(
            f"{bundle.path} can't be written: {error}. Check the disk and the folder's permissions."
        ) from error
    return Bundle(path=bundle.path, manifest=manifest), bundle.file(name)


def _inside(bundle: Bundle, relative: str) -> PurePosixPath:
    try:
        target = bundle.file(bundle_path(relative))
        if not target.parent.resolve().is_relative_to(bundle.path.resolve()):
            raise ValueError(f"{relative!r} is not a path inside the bundle")
    except (ValueError, RuntimeError) as error:  # the latter from a loop of links
        raise BundleError(f"{bundle.path}: {error}. Name a file below the bundle's folder.") from error
    return PurePosixPath(relative)


def _stored_as(path: PurePosixPath, files: Iterable[str]) -> set[str]:
    """Return those of `files` that hold earlier contents of `path`."""
    stem, suffix = re.escape(str(path.with_suffix(""))), re.escape(path.suffix)
    pattern = re.compile(rf"{stem}-[0-9a-f]{{{_HASH_DIGITS}}}{suffix}")
    return {name for name in files if pattern.fullmatch(name)}


def _current_manifest(bundle: Bundle) -> Manifest:
    """Return the manifest as it is on the disk now, if it is still the same bundle's."""
    manifest = manifest_from_json(_manifest_text(bundle.path), where=str(bundle.path))
    if _identity(manifest) != _identity(bundle.manifest):
        raise BundleError(f"{bundle.path} was replaced by another bundle meanwhile. Start again with the new one.")
    return manifest


def _identity(manifest: Manifest) -> tuple[object, ...]:
    """Return all that a measurement on a bundle depends on."""
    files: Mapping[str, FileRecord] = {name: record for name, record in manifest.files.items() if _is_engine_file(name)}
    return manifest.checkpoint_sha256, manifest.model, manifest.schedule, manifest.backend, files


def measured_identity(bundle: Bundle) -> str:
    """Return the SHA-256 of all that a measurement on a bundle depends on, whatever was stored in it since."""
    return hashlib.sha256(repr(_identity(bundle.manifest)).encode()).hexdigest()


def _remove_unlisted(path: Path, names: Iterable[str]) -> None:
    """Remove those files that the manifest doesn't list; one that stays behind is never read."""
    with suppress(OSError, BundleError):
        listed = manifest_from_json(_manifest_text(path), where=str(path)).files
        for name in names:
            if name not in listed:
                (path / name).unlink(missing_ok=True)
