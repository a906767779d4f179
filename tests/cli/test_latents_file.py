"""Invariant: a file gives the array that the run needs or one line, whatever it promises, and is never run."""

from __future__ import annotations

import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from adacorr_deploy.cli.latents_file import latents_from_npy, npy_from_latents
from adacorr_deploy.core.errors import RequestError

SHAPE = (3, 1, 4, 5)
LATENTS = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.npy"
    path.write_bytes(npy_from_latents(LATENTS))
    np.testing.assert_array_equal(latents_from_npy(path, SHAPE), LATENTS)


def test_columns_first_is_read_too(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.asfortranarray(LATENTS))
    assert b"'fortran_order': True" in (tmp_path / "in.npy").read_bytes()
    np.testing.assert_array_equal(latents_from_npy(tmp_path / "in.npy", SHAPE), LATENTS)


def saved(array: NDArray[np.generic]) -> Callable[[Path], object]:
    return lambda path: np.save(path, array)


def written(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def with_header(header: str, *, version: int = 1) -> Callable[[Path], object]:
    text = header.encode("latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return written(b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(4 * LATENTS.size))


def with_shape(shape: str) -> Callable[[Path], object]:
    return with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n")


def picture(path: Path) -> None:
    Image.new("L", (4, 5)).save(path, format="PNG")


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, latents=LATENTS)


def linked(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (saved(LATENTS[:2]), r"holds float32 of shape \(2, 1, 4, 5\), this run needs float32 of shape \(3, 1, 4, 5\)"),
        (saved(LATENTS.astype(np.float64)), "holds float64 of shape"),
        (saved(LATENTS.astype(">f4")), "holds >f4 of shape"),
        (saved(np.array([{"a": 1}], dtype=object)), "holds object of shape"),
        (with_shape("(1000000000000, 1)"), r"shape \(1000000000000, 1\)"),
        (with_shape("(-3, -1, 4, 5)"), r"shape \(-3, -1, 4, 5\)"),
        (with_shape(f"({10**30},)"), "holds float32"),
        (with_shape("(3, 1, 4, 'x')"), "is no array file"),
        (with_header("{'descr': '<f4', (((("), "is no array file"),
        (with_header("(" * 4000), "is no array file"),
        (with_header("{" + " " * 60_000), "is no array file"),
        (with_header("{" + " " * 5_000_000, version=2), "is no array file"),
        (with_header("{'descr': ('<f4', (1000000000, 1000000000)), 'fortran_order': False, 'shape': ()}"), "no array"),
        (with_header("{'descr': 5, 'fortran_order': False, 'shape': (1,)}"), "is no array file"),
        (with_header("{}", version=9), "is no array file"),
        (written(npy_from_latents(LATENTS)[:-4]), "is truncated"),
        (written(b"\x93NUMPY"), "is no array file"),
        (written(b"PK\x03\x04rest"), "is no array file"),
        (written(b""), "is no array file"),
        (written(pickle.dumps([1, 2])), "is no array file"),
        (picture, "is no array file"),
        (archive, "is no array file"),
        (os.mkfifo, "is not a regular file"),
        (os.mkdir, "is not a regular file"),
        (linked("/dev/zero"), "is not a regular file"),
        (linked("in.npy"), "Too many levels of symbolic links"),
        (linked("nowhere"), "No such file"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "in.npy"
    write(path)
    with pytest.raises(RequestError, match=message) as raised:
        latents_from_npy(path, SHAPE)
    assert re.match(rf"{path} (can't be read as latents: |holds )", str(raised.value))
    assert len(str(raised.value)) < 300 + len(str(path))
