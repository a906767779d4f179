"""An output appears whole or not at all, whoever else builds there and whenever a build was killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adacorr_deploy.core.errors import OutputError
from adacorr_deploy.core.folder_lock import locked
from adacorr_deploy.core.output_folder import check_output_folder, output_folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "x.bundle"


def fill(folder: Path, content: str) -> None:
    """Make what looks like a bundle from outside."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    (folder / "parts" / "embed.onnx").write_text(content)
    (folder / "manifest.json").write_text(content)


def build(output: Path, content: str, *, overwrite: bool = False, meanwhile: Callable[[], object] = list) -> None:
    with output_folder(output, overwrite=overwrite) as folder:
        fill(folder, content)
        meanwhile()


def content(output: Path) -> str:
    (text,) = {(output / name).read_text() for name in ("manifest.json", "parts/embed.onnx")}
    return text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(output: Path, message: str, *, overwrite: bool = False) -> None:
    """Before any work, and again by the build, which changes nothing."""
    for attempt in (check_output_folder, build_nothing):
        with pytest.raises(OutputError, match=message):
            attempt(output, overwrite=overwrite)


def build_nothing(output: Path, *, overwrite: bool) -> None:
    with output_folder(output, overwrite=overwrite):
        pytest.fail("started to build")


def test_a_folder_with_an_empty_parts_takes_the_place_of_the_output(output: Path) -> None:
    with output_folder(output, overwrite=False) as folder:
        assert (names(folder), names(folder / "parts")) == (["parts"], [])
        assert not output.exists()
        fill(folder, "new")
    assert content(output) == "new"
    assert names(output.parent) == ["x.bundle"]


# --- Others at the same output -----------------------------------------------------------------------------------


def theirs(output: Path) -> None:
    build(output, "theirs")


def dangling_link(output: Path) -> None:
    output.symlink_to("nowhere")


@pytest.mark.parametrize("make", [theirs, Path.mkdir, Path.touch, dangling_link])
@pytest.mark.parametrize("locks", [True, False])
def test_what_appears_meanwhile_is_not_replaced_without_overwrite(
    output: Path, make: Callable[[Path], None], locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(OutputError, match=r"exists\. Choose another folder"):
        build(output, "mine", meanwhile=lambda: make(output))
    assert names(output.parent) == ["x.bundle"]
    assert make is not theirs or content(output) == "theirs"


def test_a_folder_that_appears_at_the_very_renaming_stays(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a program that knows nothing of our locks."""
    rename = Path.rename

    def too_late(path: Path, target: Path) -> Path:
        fill(output, "theirs")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", too_late)
    with pytest.raises(OutputError, match=r"can't be written: .*not empty"):
        build(output, "mine")
    assert content(output) == "theirs"
    assert names(output.parent) == ["x.bundle"]


def test_overwrite_replaces_no_other_folder_that_took_the_bundles_place(output: Path) -> None:
    def another_folder() -> None:
        output.rename(output.with_name("moved"))
        output.mkdir()
        (output / "thesis.tex").touch()

    build(output, "old")
    with pytest.raises(OutputError, match="is not a bundle"):
        build(output, "new", overwrite=True, meanwhile=another_folder)
    assert names(output) == ["thesis.tex"]
    assert content(output.with_name("moved")) == "old"
    assert names(output.parent) == ["moved", "x.bundle"]


def test_of_builds_at_the_same_time_one_wins_and_the_others_are_told(output: Path) -> None:
    ready = threading.Barrier(6)
    won: list[str] = []
    told: list[str] = []

    def one(name: str) -> None:
        try:
            with output_folder(output, overwrite=False) as folder:
                fill(folder, name)
                ready.wait()
        except OutputError as error:
            told.append(str(error))
        else:
            won.append(name)

    threads = [threading.Thread(target=one, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content(output)] == won
    assert ["exists" in message for message in told] == [True] * 5
    assert names(output.parent) == ["x.bundle"]


# --- What may be replaced ----------------------------------------------------------------------------------------


def test_only_a_bundle_is_replaced_and_only_if_asked(output: Path) -> None:
    build(output, "old")
    refused(output, "exists. Choose another folder with -o, remove it, or give --overwrite")
    assert content(output) == "old"
    build(output, "new", overwrite=True)
    assert content(output) == "new"
    assert names(output.parent) == ["x.bundle"]


@pytest.mark.parametrize("below", [".", "transformer", "transformer/deep"])
def test_neither_a_checkpoint_nor_what_holds_it_is_ever_replaced(tmp_path: Path, below: str) -> None:
    checkpoint = tmp_path / "mine" / below
    checkpoint.mkdir(parents=True)
    for name in ("model_index.json", "config.json", "weights.safetensors"):
        (checkpoint / name).write_text(name)
    refused(tmp_path / "mine", "is not a bundle, so --overwrite leaves it alone", overwrite=True)
    refused(checkpoint, "is not a bundle", overwrite=True)
    assert len(names(checkpoint)) == 3


def test_a_folder_with_some_other_manifest_is_no_bundle(output: Path) -> None:
    output.mkdir()
    (output / "manifest.json").write_text('{"manifest_version": 3}')  # a browser extension's
    refused(output, "is not a bundle", overwrite=True)


def test_an_output_at_or_below_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file", "exists")
    refused(tmp_path / "file", "is not a bundle", overwrite=True)
    for below in ("x.bundle", "deep/er/x.bundle"):
        refused(tmp_path / "file" / below, f"can't be written: {tmp_path}/file is not a folder. .* -o")
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == ["file"]


def test_check_makes_nothing(output: Path) -> None:
    check_output_folder(output.parent / "a" / "b" / "x.bundle", overwrite=True)
    assert names(output.parent) == []


# --- Links -------------------------------------------------------------------------------------------------------


def test_through_a_link_the_bundle_itself_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real.bundle", tmp_path / "link.bundle"
    build(real, "old")
    link.symlink_to("disk/real.bundle")
    build(link, "new", overwrite=True)
    assert content(real) == "new"
    assert link.is_symlink()
    assert names(tmp_path) == ["disk", "link.bundle"]
    assert names(tmp_path / "disk") == ["real.bundle"]
    refused(link, "exists")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("target", ["nowhere", "link.bundle"])
def test_a_link_to_nothing_is_refused_before_any_work(tmp_path: Path, overwrite: bool, target: str) -> None:
    (tmp_path / "link.bundle").symlink_to(target)
    refused(tmp_path / "link.bundle", "is a link to nothing", overwrite=overwrite)
    refused(tmp_path / "link.bundle" / "x.bundle", "is not a folder", overwrite=overwrite)
    assert names(tmp_path) == ["link.bundle"]


# --- Killed builds -----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path

from adacorr_deploy.core import output_folder as module

output, overwrite, renames = Path(sys.argv[1]), sys.argv[2] == "overwrite", int(sys.argv[3])
rename = Path.rename

def killed(path, target):
    global renames
    if renames == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    renames -= 1
    return rename(path, target)

Path.rename = killed
module.shutil.rmtree = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
with module.output_folder(output, overwrite=overwrite) as folder:
    (folder / "parts/embed.onnx").write_text("killed's")
    (folder / "manifest.json").write_text("killed's")
"""


def killed_build(output: Path, *, overwrite: bool = False, renames: int = 0) -> None:
    """Build in a process that is killed after so many renamings."""
    arguments: list[str | Path] = [output, "overwrite" if overwrite else "", str(renames)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert ended.returncode == -signal.SIGKILL


def test_what_a_killed_build_left_is_removed_by_the_next_one_there(output: Path) -> None:
    killed_build(output)
    assert len(names(output.parent)) == 1
    build(output.with_name("other.bundle"), "other")
    assert len(names(output.parent)) == 2  # which is not of this output
    build(output, "new")
    assert content(output) == "new"
    assert names(output.parent) == ["other.bundle", "x.bundle"]


@pytest.mark.parametrize("fails", [True, False])
def test_a_bundle_that_was_out_of_the_way_of_a_killed_build_comes_back(output: Path, fails: bool) -> None:
    build(output, "old")
    killed_build(output, overwrite=True, renames=1)
    assert not output.exists()
    if fails:
        with pytest.raises(ZeroDivisionError), output_folder(output, overwrite=True):
            raise ZeroDivisionError
        assert content(output) == "old"
    else:
        build(output, "new", overwrite=True)
        assert content(output) == "new"
    assert names(output.parent) == ["x.bundle"]


def test_a_bundle_that_came_back_is_not_replaced_without_overwrite(output: Path) -> None:
    build(output, "old")
    killed_build(output, overwrite=True, renames=1)
    with pytest.raises(OutputError, match="exists"):
        build_nothing(output, overwrite=False)
    assert content(output) == "old"
    assert names(output.parent) == ["x.bundle"]


def test_after_a_build_that_was_killed_in_the_end_its_bundle_stays(output: Path) -> None:
    build(output, "old")
    killed_build(output, overwrite=True, renames=2)
    assert content(output) == "killed's"
    refused(output, "exists")
    with pytest.raises(ZeroDivisionError), output_folder(output, overwrite=True):
        raise ZeroDivisionError
    assert content(output) == "killed's"
    assert names(output.parent) == ["x.bundle"]


def test_what_a_living_build_works_in_stays(output: Path) -> None:
    with output_folder(output, overwrite=True) as living:
        fill(living, "living")
        build(output, "quick")
        build(output, "quick again", overwrite=True)
        assert content(living) == "living"
    assert content(output) == "living"


def test_nobody_clears_up_between_the_two_renamings(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is out of the way for a moment looks like what a killed build left."""
    build(output, "old")
    rename = Path.rename
    seen: list[bool] = []

    def renamed(path: Path, target: Path) -> Path:
        with locked(output.parent, wait=False) as held:
            seen.append(held)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    build(output, "new", overwrite=True)
    assert seen == [False, False]


def test_where_there_are_no_locks_nothing_is_cleared_up(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can't be known then whether another build is alive, and has only just moved the old bundle away."""
    build(output, "old")
    killed_build(output, overwrite=True, renames=1)
    left = names(output.parent)
    assert sorted(name.rpartition(".")[2] for name in left) == ["building", "replaced"]
    monkeypatch.setitem(sys.modules, "fcntl", None)
    build(output, "new")
    assert names(output.parent) == [*left, "x.bundle"]


@pytest.mark.parametrize(
    "name", [".x.bundle.y.12ab.building", ".x.bundle.building", "x.bundle.12ab.building", ".xxbundle.1.building"]
)
def test_names_that_only_look_like_a_builds_are_left_alone(output: Path, name: str) -> None:
    fill(output.with_name(name), "mine")
    fill(output.with_name(name.replace("building", "replaced")), "mine")
    build(output, "new")
    assert len(names(output.parent)) == 3
    assert content(output) == "new"


def test_what_is_storing_a_calibration_is_waited_for(output: Path) -> None:
    """Its manifest must not land in the new bundle, whose files it doesn't list."""
    build(output, "old")
    replaced = threading.Thread(target=build, args=(output, "new"), kwargs={"overwrite": True})
    with locked(output) as held:
        assert held
        replaced.start()
        replaced.join(0.2)
        assert content(output) == "old"
    replaced.join()
    assert content(output) == "new"


def test_permissions_are_those_of_any_new_folder(output: Path) -> None:
    build(output, "new")
    (output.parent / "any").mkdir()
    assert output.stat().st_mode == (output.parent / "any").stat().st_mode
