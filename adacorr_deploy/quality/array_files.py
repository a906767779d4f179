"""Archives of arrays that are read back: anybody may have written them since."""

from __future__ import annotations

import tokenize
import zipfile
from collections.abc import Collection
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]

# Beside what zipfile and NumPy document: an encrypted member, a header that is no Python, sizes that no memory holds.
_FAULTS = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, tokenize.TokenError)


def npz_from_arrays(**arrays: NDArray[np.generic]) -> bytes:
    """Return an uncompressed archive of arrays."""
    content = BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    return content.getvalue()


def arrays_from_npz(content: bytes, names: Collection[str]) -> Arrays:
    """Return the arrays of an archive that holds these names and no others.

    Raises:
        ValueError: If it is no archive of arrays, its names are others, or it is compressed (a small file could
            grow without end).
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
        with np.load(BytesIO(content), allow_pickle=False) as file:
            if set(file.files) != set(names):
                raise ValueError(f"it holds {', '.join(file.files)}")
            return {name: np.asarray(file[name]) for name in names}
    except _FAULTS as error:
        raise ValueError(f"no archive of {', '.join(names)}: {error}") from error
