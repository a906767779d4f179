"""Partial results are found again by the same measurement only, and nothing that another left is trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.quality.array_files import Arrays
from adacorr_deploy.quality.partials import Partials

LIKE: Arrays = {"a": np.zeros((2, 3)), "b": np.zeros(4, np.float32)}


def filled() -> Arrays:
    return {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(4, np.float32)}


def test_what_was_stored_is_found_by_the_same_measurement(tmp_path: Path) -> None:
    Partials(tmp_path / "x", {"steps": 5}).store("one", filled())
    found = Partials(tmp_path / "x", {"steps": 5}).load("one", LIKE)
    assert found is not None
    for name, array in filled().items():
        np.testing.assert_array_equal(found[name], array)


def test_another_measurement_finds_nothing_and_removes_it(tmp_path: Path) -> None:
    Partials(tmp_path / "x", {"steps": 5}).store("one", filled())
    assert Partials(tmp_path / "x", {"steps": 6}).load("one", LIKE) is None
    assert Partials(tmp_path / "x", {"steps": 5}).load("one", LIKE) is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": np.zeros((2, 3))},
        {"a": np.zeros((3, 2)), "b": np.zeros(4, np.float32)},
        {"a": np.zeros((2, 3)), "b": np.zeros(4)},
        {"a": np.zeros((2, 3)), "b": np.zeros(4, np.float32), "c": np.zeros(1)},
        {"a": np.zeros((2, 3)), "b": np.zeros(4_000_000, np.float32)},
    ],
)
def test_other_names_shapes_types_and_sizes_are_not_taken(tmp_path: Path, arrays: Arrays) -> None:
    partials = Partials(tmp_path / "x", {})
    partials.store("one", arrays)
    assert partials.load("one", LIKE) is None


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04pickled"])
def test_a_file_that_is_none_of_ours_is_not_taken(tmp_path: Path, content: bytes) -> None:
    partials = Partials(tmp_path / "x", {})
    (tmp_path / "x" / "one.npz").write_bytes(content)
    assert partials.load("one", LIKE) is None


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    partials = Partials(tmp_path / "x", {})
    np.savez(tmp_path / "x" / "one.npz", a=np.array([{"an": "object"}], dtype=object))
    assert partials.load("one", LIKE) is None


def test_a_discarded_measurement_leaves_no_folder_and_a_linked_one_only_loses_the_link(tmp_path: Path) -> None:
    partials = Partials(tmp_path / "x", {})
    partials.store("one", filled())
    partials.discard()
    partials.discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("kept")
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    Partials(tmp_path / "x", {"steps": 1}).store("one", filled())
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"


def test_a_place_that_can_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="can't be written"):
        Partials(tmp_path / "file" / "x", {})
