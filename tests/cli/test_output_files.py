"""Invariant: outputs are refused before any work if they can't be written or would spoil something; else all appear."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adacorr_deploy.cli.output_files import check_new_folder, check_outputs, write_files
from adacorr_deploy.core.errors import OutputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a bundle, an input, and some that can't be written to."""
    monkeypatch.chdir(tmp_path)
    for name in ("bundle", "taken", "sub"):
        Path(name).mkdir()
    Path("in.npy").touch()
    Path("link").symlink_to("bundle")
    Path("alias.npy").symlink_to("in.npy")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["bundle/manifest.json"], "lies in the bundle bundle, which is only read"),
        (["bundle"], "lies in the bundle"),
        (["link/new/x"], "lies in the bundle"),
        (["sub/../bundle/x"], "lies in the bundle"),
        (["in.npy"], "in.npy would overwrite an input"),
        (["alias.npy"], "would overwrite an input"),
        (["new/a", "sub/../new/a"], "sub/../new/a is also the output new/a"),
        (["new/a/b", "new/a"], "new/a/b would lie below the output file new/a"),
        (["new/a", "new/a/b/c"], "new/a/b/c would lie below the output file new/a"),
        (["taken"], "taken is a folder"),
        (["pipe"], "pipe is a device or a pipe"),
        (["/dev/null"], "/dev/null is a device or a pipe"),
        (["in.npy/x"], "in.npy is a file, not a folder"),
        (["x" * 300], "File name too long"),
        (["loop"], "loop"),
        (["loop/x"], "loop"),
    ],
)
def test_an_output_that_spoils_something_is_refused(folder: Path, files: list[str], message: str) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(OutputError) as raised:
        check_outputs(map(Path, ["fine", *files]), bundle=Path("bundle"), inputs=[Path("in.npy")])
    assert message in str(raised.value)
    assert sorted(folder.rglob("*")) == before


def test_other_outputs_are_allowed_and_nothing_is_made(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    inputs = [Path("none"), Path("y" * 5000), Path("taken")]  # presets' names among them, and no files
    files = ["new/deep/a", "new/b", "in.npy", "bundle2", "x" * 255, "none", "taken/a", "../c"]
    check_outputs(map(Path, files), bundle=Path("bundle"), inputs=inputs)
    assert sorted(folder.rglob("*")) == before


def test_a_folder_that_holds_an_input_is_not_replaced(folder: Path) -> None:
    with pytest.raises(OutputError, match="bundle holds the input link/model and would replace it"):
        check_new_folder(Path("bundle"), inputs=[Path("link/model")])
    check_new_folder(Path("new"), inputs=[Path("bundle"), Path("newer")])


def test_a_folder_whose_path_onnx_can_not_read_is_refused(folder: Path) -> None:
    with pytest.raises(OutputError, match=r"no path in UTF-8.*the bundle can be moved there"):
        check_new_folder(folder / os.fsdecode(b"a\xff"), inputs=[])
    Path(os.fsdecode(b"b\xff")).mkdir()
    os.chdir(b"b\xff")
    with pytest.raises(OutputError, match="new has no path in UTF-8"):
        check_new_folder(Path("new"), inputs=[])


def test_files_with_long_names_and_behind_links_are_written(folder: Path) -> None:
    Path("latest").symlink_to("sub/run")
    write_files({Path("x" * 255): b"1", Path("latest"): b"2", Path("alias.npy"): b"3"})
    assert (folder / ("x" * 255)).read_bytes() == b"1"
    assert (folder / "sub" / "run").read_bytes() == b"2"
    assert (folder / "in.npy").read_bytes() == b"3"
    assert Path("alias.npy").is_symlink()
    assert not list(folder.rglob("*.part"))
