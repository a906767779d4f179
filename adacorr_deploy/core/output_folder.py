"""Where a bundle is built: a folder beside its output, which takes the output's place whole or not at all.

Two builds into one output never meet: each works in a folder of its own, and what they do to the names beside the
output, they do under the lock of the folder that holds them. A build that was killed leaves its folder, and maybe the
folder that it was replacing under another name; the next build into that output clears up after it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adacorr_deploy.core.bundle import PARTS_DIR, is_bundle
from adacorr_deploy.core.errors import OutputError
from adacorr_deploy.core.folder_lock import locked

_BUILDING: Final = "building"  # a folder that is not complete
_REPLACED: Final = "replaced"  # a folder that was moved out of its successor's way


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderKind:
    """What is built: bundles, or other folders of ours."""

    name: str  # in messages
    is_one: Callable[[Path], bool]  # recognises one, however damaged: nothing else is ever overwritten
    inner: str  # a folder in it whose lock says that a build is alive; "" is the folder itself


BUNDLE: Final = FolderKind(name="bundle", is_one=is_bundle, inner=PARTS_DIR)


def check_output_folder(output: Path, *, overwrite: bool, kind: FolderKind = BUNDLE) -> None:
    """Refuse an output that may not be replaced, or that can't be made. Makes and changes nothing.

    Raises:
        OutputError: If it exists and isn't one of its kind to overwrite, is a link to nothing, or stands below a file.
    """
    try:
        if output.exists():
            _check_replaceable(output, overwrite=overwrite, kind=kind)
        elif output.is_symlink():
            raise OutputError(f"{output} is a link to nothing. Remove it, or choose another folder with -o.")
        above = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise OutputError(f"{output} can't be written: {above} is not a folder. Choose another folder with -o.")
    except OSError as error:  # a name too long, a folder that may not be read
        raise OutputError(f"{output} can't be written: {error}. Choose another folder with -o.") from error


def _check_replaceable(output: Path, *, overwrite: bool, kind: FolderKind) -> None:
    if not overwrite:
        raise OutputError(f"{output} exists. Choose another folder with -o, remove it, or give --overwrite.")
    if not kind.is_one(output):
        raise OutputError(
            f"{output} is not a {kind.name}, so --overwrite leaves it alone. Choose another folder with -o."
        )


@contextmanager
def output_folder(output: Path, *, overwrite: bool, kind: FolderKind = BUNDLE) -> Iterator[Path]:
    """Lend a folder with an empty `kind.inner` in it, and rename it to `output` at the end of the block.

    It is removed if the block, or the renaming, raises anything.

    Args:
        output: Where it is to stand; where it is a link, the folder that it leads to is replaced.
        overwrite: Replace what stands there, if it is of this kind.
        kind: What is built.

    Raises:
        OutputError: If `output` may not be replaced, at the beginning or in the end, or can't be written.
    """
    check_output_folder(output, overwrite=overwrite, kind=kind)
    try:
        target = output.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as resources:
            with locked(target.parent) as held:
                if held:
                    _clear_up_after_killed_builds(target, kind)
                check_output_folder(output, overwrite=overwrite, kind=kind)  # an earlier one may be back
                folder = _sibling(target, _BUILDING)
                resources.callback(shutil.rmtree, folder, ignore_errors=True)
                folder.mkdir()
                (folder / kind.inner).mkdir(exist_ok=True)
                resources.enter_context(locked(folder / kind.inner))  # says that this build is alive
            yield folder
            _move_into_place(folder, target, overwrite=overwrite, kind=kind)
    except OSError as error:
        raise OutputError(
            f"{output} can't be written: {error}. Free some space or choose another folder with -o."
        ) from error


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{kind}")


def _move_into_place(folder: Path, target: Path, *, overwrite: bool, kind: FolderKind) -> None:
    with locked(target.parent), locked(target):  # the latter: nobody is storing a calibration in the old bundle
        if not os.path.lexists(target):
            folder.rename(target)
            return
        _check_replaceable(target, overwrite=overwrite, kind=kind)
        replaced = _sibling(target, _REPLACED)
        try:
            target.rename(replaced)
            folder.rename(target)
        finally:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            shutil.rmtree(replaced, ignore_errors=True)


def _clear_up_after_killed_builds(target: Path, kind: FolderKind) -> None:
    """Remove what no build is using any more; the caller holds the lock of the folder around it.

    What was moved out of the way of a folder that never came goes back to its place.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.\w+\.({_BUILDING}|{_REPLACED})")
    for left in sorted(target.parent.iterdir()):
        found = name.fullmatch(left.name)
        if found is None:
            continue
        if found[1] == _REPLACED and kind.is_one(left) and not os.path.lexists(target):
            left.rename(target)
        elif found[1] == _REPLACED or _is_abandoned(left, kind):
            shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(folder: Path, kind: FolderKind) -> bool:
    """Say whether the build that made a folder has ended. Process ids wouldn't do: each container has its own."""
    with locked(folder / kind.inner, wait=False) as held:
        return held or not (folder / kind.inner).exists()
