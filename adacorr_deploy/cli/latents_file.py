"""Latents from and to .npy files. A file from elsewhere is untrusted: nothing in it is run, nor allocated."""

from __future__ import annotations

import io
import math
import stat
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError

_HEADER_BYTES: Final = 4096  # NumPy's own is 128 for any array of numbers
_HEADER_READERS: Final = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# NumPy hands a header to Python's own parsers, which can fail in all of these ways.
_BAD_HEADER: Final = (
    ArithmeticError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)


def latents_from_npy(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Read an array file, of which nothing beyond the header is read unless it holds float32 of `shape`.

    Args:
        path: A regular file, as `numpy.save` writes it.
        shape: (B, C, H, W), which the run needs. The values are the request's to check.

    Raises:
        RequestError: If it can't be read, is no .npy file, is truncated, or holds another array.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever, a device may never end
            raise _unreadable(path, "it is not a regular file")
        with path.open("rb") as file:
            return _array(path, file, shape)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


def _array(path: Path, file: BinaryIO, shape: tuple[int, ...]) -> NDArray[np.float32]:
    header = io.BytesIO(file.read(_HEADER_BYTES))
    try:
        read = _HEADER_READERS[npy.read_magic(header)]
        found, fortran_order, dtype = read(header, max_header_size=_HEADER_BYTES)
    except _BAD_HEADER as error:
        raise _unreadable(path, "it is no array file") from error
    if dtype != np.float32 or found != shape:
        raise RequestError(
            f"{path} holds {dtype} of shape {found}, this run needs float32 of shape {shape}, for {shape[0]} "
            "images. Give an array of that shape, or ask for other images."
        )
    file.seek(header.tell())
    content = file.read(4 * math.prod(shape))
    if len(content) < 4 * math.prod(shape):
        raise _unreadable(path, "it is truncated")
    return np.frombuffer(content, np.float32).reshape(shape, order="F" if fortran_order else "C")


def _unreadable(path: Path, reason: str | None) -> RequestError:
    return RequestError(
        f"{path} can't be read as latents: {reason}. Give a .npy file of one float32 array (numpy.save)."
    )


def npy_from_latents(latents: NDArray[np.float32]) -> bytes:
    """Return the .npy file's bytes."""
    buffer = io.BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    return buffer.getvalue()
