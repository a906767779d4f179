"""Writing a command's results: asked for before the work starts, written after it, all of them or none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from adacorr_deploy.core.errors import OutputError


def check_outputs(files: Iterable[Path], *, bundle: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse outputs that can't be made or would spoil something, before hours of work go into them. Makes nothing.

    Args:
        files: What will be written.
        bundle: That is read: nothing is written into it.
        inputs: Other files that are read, if they exist: none of them is overwritten.

    Raises:
        OutputError: If a file can't be written, lies in the bundle, is an input, or is asked for twice.
    """
    kept, targets = _target(bundle), dict[Path, Path]()
    sources = {_target(path) for path in inputs if os.path.isfile(path)}  # noqa: PTH113  for Path, some names are errors
    for path in files:
        target = _target(path)
        if target.is_relative_to(kept):
            raise OutputError(f"{path} lies in the bundle {bundle}, which is only read. Choose another output.")
        if target in sources:
            raise OutputError(f"{path} would overwrite an input of this command. Choose another output.")
        if target in targets:
            raise OutputError(f"{path} is also the output {targets[target]}. Choose another name for one of them.")
        _check_can_be_made(path, target)
        targets[target] = path
    for target, path in targets.items():
        if both := targets.keys() & set(target.parents):
            raise OutputError(f"{path} would lie below the output file {targets[both.pop()]}. Choose another folder.")


def check_new_folder(folder: Path, *, inputs: Iterable[Path]) -> None:
    """Refuse a folder of which an input is a part: it would be replaced with the folder.

    Raises:
        OutputError: If an input lies in the folder, or ONNX's tools can't write to it.
    """
    for path in inputs:
        if _target(path).is_relative_to(_target(folder)):
            raise OutputError(f"{folder} holds the input {path} and would replace it. Choose another folder.")
    try:
        str(_target(folder)).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"{folder} has no path in UTF-8, which ONNX needs. Build elsewhere; the bundle can be moved there."
        ) from error


def _target(path: Path) -> Path:
    """Return where a path leads, links followed: what is the same file has the same target."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links, a working folder that is gone
        raise OutputError(f"{path} can't be found: {error}. Choose another path.") from error


def _check_can_be_made(path: Path, target: Path) -> None:
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder. Give the name of a file.")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or a pipe, which can't be replaced. Give the name of a file.")
        existing = next(above for above in target.parents if above.exists())
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise OutputError(f"{path} can't be written: {error.strerror}. Choose another output.") from error
    if not existing.is_dir():
        raise OutputError(f"{path} can't be written: {existing} is a file, not a folder. Choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"{path} can't be written: {existing} is read-only. Choose another folder.")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files so that none appears before all are on the disk; files of the same names are replaced.

    Raises:
        OutputError: If the disk is full, or a folder can't be written. What was there before is still there.
    """
    targets = {path: _target(path) for path in files}
    partials = {
        path: target.with_name(f".adacorr-{os.getpid()}-{index}.part")
        for index, (path, target) in enumerate(targets.items())
    }
    path = Path()
    try:
        for path, content in files.items():
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            partials[path].write_bytes(content)
        for path, partial in partials.items():
            partial.replace(targets[path])
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
