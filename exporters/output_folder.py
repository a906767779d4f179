"""Where a bundle is built: a folder beside its output, which takes the output's place whole or not at all.

Two builds into one output never meet: each works in a folder of its own, and what they do to the names beside the
output, they do under the lock of the folder that holds them. A build that was killed leaves its folder, and maybe the
bundle that it was replacing under another name; the next build into that output clears up after it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from adacorr_deploy.core.bundle import PARTS_DIR, is_bundle
from adacorr_deploy.core.errors import OutputError
from adacorr_deploy.core.folder_lock import locked

_BUILDING: Final = "building"  # a bundle that is not complete
_REPLACED: Final = "replaced"  # a bundle that was moved out of its successor's way


def check_output_folder(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that may not be replaced, or that can't be made. Makes and changes nothing.

    Raises:
        OutputError: If it exists and isn't a bundle to overwrite, is a link to nothing, or stands below a file.
    """
    try:
        if output.exists():
            _check_replaceable(output, overwrite=overwrite)
        elif output.is_symlink():
            raise OutputError(f"{output} is a link to nothing. Remove it, or choose another folder with -o.")
        above = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise OutputError(f"{output} can't be written: {above} is not a folder. Choose another folder with -o.")
    except OSError as error:  # a name too long, a folder that may not be read
        raise OutputError(f"{output} can't be written: {error}. Choose another folder with -o.") from error


def _check_replaceable(output: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{output} exists. Choose another folder with -o, remove it, or give --overwrite.")
    if not is_bundle(output):
        raise OutputError(f"{output} is not a bundle, so --overwrite leaves it alone. Choose another folder with -o.")


@contextmanager
def output_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Lend a folder with an empty `parts` in it, and rename it to `output` at the end of the block.

    It is removed if the block, or the renaming, raises anything.

    Args:
        output: The bundle's folder; where it is a link, the folder that it leads to is replaced.
        overwrite: Replace the bundle that stands there.

    Raises:
        OutputError: If `output` may not be replaced, at the beginning or in the end, or can't be written.
    """
    check_output_folder(output, overwrite=overwrite)
    try:
        target = output.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as resources:
            with locked(target.parent) as held:
                if held:
                    _clear_up_after_killed_builds(target)
                check_output_folder(output, overwrite=overwrite)  # an earlier bundle may be back
                folder = _sibling(target, _BUILDING)
                resources.callback(shutil.rmtree, folder, ignore_errors=True)
                folder.mkdir()
                (folder / PARTS_DIR).mkdir()
                resources.enter_context(locked(folder / PARTS_DIR))  # says that this build is alive
            yield folder
            _move_into_place(folder, target, overwrite=overwrite)
    except OSError as error:
        raise OutputError(
            f"{output} can't be written: {error}. Free some space or choose another folder with -o."
        ) from error


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _move_into_place(folder: Path, target: Path, *, overwrite: bool) -> None:
    with locked(target.parent), locked(target):  # the latter: nobody is storing a calibration in the old bundle
        if not os.path.lexists(target):
            folder.rename(target)
            return
        _check_replaceable(target, overwrite=overwrite)
        replaced = _sibling(target, _REPLACED)
        try:
            target.rename(replaced)
            folder.rename(target)
        finally:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)


def _clear_up_after_killed_builds(target: Path) -> None:
    """Remove what no build is using any more; the caller holds the lock of the folder around it.

    A bundle that was moved out of the way of one that never came goes back to its place.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.\w+\.({_BUILDING}|{_REPLACED})")
    for left in sorted(target.parent.iterdir()):
        kind = name.fullmatch(left.name)
        if kind is None:
            continue
        if kind[1] == _REPLACED and is_bundle(left) and not os.path.lexists(target):
            left.rename(target)
        elif kind[1] == _REPLACED or _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Say whether the build that made a folder has ended. Process ids wouldn't do: each container has its own."""
    with locked(folder / PARTS_DIR, wait=False) as held:
        return held or not (folder / PARTS_DIR).exists()
