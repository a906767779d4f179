"""Writing a command's results: asked for before the work starts, written after it, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from adacorr_deploy.core.errors import OutputError


def check_file_can_be_made(path: Path) -> None:
    """Refuse an output whose folder can't be made or written, before hours of work go into it. Makes nothing.

    Raises:
        OutputError: If `path` is a folder, or its folder stands below a file, is read-only, or may not be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a file.")
    check_folder_can_be_made(path.parent)


def check_folder_can_be_made(folder: Path) -> None:
    """See `check_file_can_be_made`."""
    existing = next(above for above in (folder, *folder.absolute().parents) if above.exists())
    if not existing.is_dir():
        raise OutputError(f"{folder} can't be written: {existing} is a file, not a folder. Choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} can't be written: {existing} is read-only. Choose another folder.")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files so that none appears before all are on the disk; files of the same names are replaced.

    Raises:
        OutputError: If the disk is full, or a folder can't be written. What was there before is still there.
    """
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partials[path].write_bytes(content)
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} can't be written: {error.strerror}. Free some space, or choose another output."
        ) from error
    finally:
        for partial in partials.values():
            _remove(partial)


def _remove(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError:
        return  # its folder was never made, or can't be changed: the first error says so
