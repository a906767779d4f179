"""Latents from and to .npy files. A file from elsewhere is untrusted: nothing in it is run, and its size is its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError


def latents_from_npy(path: Path) -> NDArray[np.float32]:
    """Map an array file. Its type, shape and values are the request's to check; only then is it read.

    Raises:
        RequestError: If it can't be read, is no .npy file, is truncated, or holds pickled objects.
    """
    try:
        # Mapped, so that a header can't ask for more memory than the file has bytes.
        latents: object = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise RequestError(
            f"{path} can't be read as latents: {_reason(error)}. Give a .npy file of one float32 array (numpy.save)."
        ) from error
    if not isinstance(latents, np.ndarray):
        raise RequestError(f"{path} is an archive of arrays. Give a .npy file of one array (numpy.save).")
    return latents


def _reason(error: Exception) -> str:
    if "pickle" in str(error):  # NumPy says so of whatever is no array file, and advises to load it unsafely
        return "it is no array file, or holds pickled objects, which are never loaded"
    return str(error) or "it is empty"


def npy_from_latents(latents: NDArray[np.float32]) -> bytes:
    """Return the .npy file's bytes."""
    buffer = io.BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    return buffer.getvalue()
