"""What a long measurement has finished so far, kept beside its bundle: an interrupted one goes on from there.

Arrays stand in .npz files of one folder, with a file that says what they belong to: another model, other options or
another version of the measurement finds them gone. They are read back as untrusted: anybody may have written them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.bundle import replace_file
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.untrusted import bounded_file
from adacorr_deploy.quality.array_files import Arrays, arrays_from_npz, npz_from_arrays

_IDENTITY: Final = "identity.json"
_MAX_IDENTITY_BYTES: Final = 1 << 20
_SLACK_BYTES: Final = 1 << 20  # what a file's headers may take beside its arrays


class Partials:
    """The finished parts of one measurement.

    Raises:
        BundleError: If the folder can't be written: better said now than after the measurement.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self._folder = folder
        text = json.dumps(identity, sort_keys=True)
        try:
            if not self._is_of(text):
                self.discard()
                folder.mkdir(parents=True)
                replace_file(folder / _IDENTITY, text.encode())
        except OSError as error:
            raise BundleError(
                f"{folder.parent} can't be written: {error}. Check the disk and the folder's permissions."
            ) from error

    def _is_of(self, identity: str) -> bool:
        try:
            return bounded_file(self._folder / _IDENTITY, limit_bytes=_MAX_IDENTITY_BYTES) == identity.encode()
        except (OSError, ValueError):
            return False

    def store(self, name: str, arrays: Arrays) -> None:
        """Store arrays under a name, whole or not at all.

        Raises:
            BundleError: If they can't be written.
        """
        try:
            replace_file(self._folder / f"{name}.npz", npz_from_arrays(**arrays))
        except OSError as error:
            raise BundleError(
                f"{self._folder} can't be written: {error}. Check the disk and the folder's permissions."
            ) from error

    def load(self, name: str, like: Mapping[str, NDArray[np.generic]]) -> Arrays | None:
        """Return what was stored under a name, or None if nothing was that has these names, shapes and types."""
        limit = sum(array.nbytes for array in like.values()) + _SLACK_BYTES
        try:
            found = arrays_from_npz(bounded_file(self._folder / f"{name}.npz", limit_bytes=limit), like)
        except (OSError, ValueError):
            return None
        same = all((found[key].shape, found[key].dtype) == (like[key].shape, like[key].dtype) for key in like)
        return found if same else None

    def discard(self) -> None:
        """Remove the folder: the measurement is complete, or these parts are another one's."""
        if self._folder.is_symlink() or self._folder.is_file():
            self._folder.unlink()
        elif self._folder.exists():
            shutil.rmtree(self._folder)
