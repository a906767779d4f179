"""A failed change leaves a bundle as it was, and changes that are made at the same time lose nothing of each other."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adacorr_deploy.core import bundle as bundle_module
from adacorr_deploy.core.bundle import open_bundle, replace_file, store_in_bundle
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import MANIFEST_NAME
from tests.core.small_bundle import raw_manifest, write_bundle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def stored(path: Path) -> dict[str, bytes]:
    """What the bundle lists below `calibration`; opening it checks the hashes."""
    opened = open_bundle(path)
    return {name: opened.file(name).read_bytes() for name in opened.manifest.files if name.startswith("calibration/")}


def test_a_stored_file_is_hashed_listed_and_the_only_one_of_its_name(path: Path) -> None:
    bundle, first = store_in_bundle(open_bundle(path), "calibration/ddim.json", b"{}")
    assert open_bundle(path).manifest == bundle.manifest
    assert re.fullmatch(r"ddim-[0-9a-f]{12}\.json", first.name)
    again, second = store_in_bundle(bundle, "calibration/ddim.json", b"[]")
    assert open_bundle(path).manifest == again.manifest
    assert stored(path) == {f"calibration/{second.name}": b"[]"}
    assert list((path / "calibration").iterdir()) == [second]


def test_the_same_content_again_changes_nothing(path: Path) -> None:
    for _ in range(2):
        _, file = store_in_bundle(open_bundle(path), "calibration/ddim.json", b"{}")
    assert stored(path) == {f"calibration/{file.name}": b"{}"}


@pytest.mark.parametrize("other", ["ddim-5", "ddim-50-x", "dddim-50", "ddim_50", "ddim-50.0"])
def test_files_of_other_names_stay(path: Path, other: str) -> None:
    bundle = open_bundle(path)
    for name, content in ((other, b"other"), ("ddim-50", b"old"), ("ddim-50", b"new")):
        bundle, _ = store_in_bundle(bundle, f"calibration/{name}.json", content)
    assert sorted(stored(path).values()) == [b"new", b"other"]


def test_what_others_stored_since_the_bundle_was_opened_stays(path: Path) -> None:
    mine, theirs = open_bundle(path), open_bundle(path)
    store_in_bundle(theirs, "calibration/theirs.json", b"theirs")
    store_in_bundle(theirs, "calibration/both.json", b"theirs too")
    bundle, _ = store_in_bundle(mine, "calibration/both.json", b"mine")
    assert sorted(stored(path).values()) == [b"mine", b"theirs"]
    assert len(list((path / "calibration").iterdir())) == 2
    assert bundle.manifest == open_bundle(path).manifest


def test_stores_at_the_same_time_lose_nothing(path: Path) -> None:
    bundle = open_bundle(path)
    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(store_in_bundle, bundle, f"calibration/{i}.json", b"%d" % i) for i in range(40)]:
            done.result()
    assert sorted(stored(path).values()) == sorted(b"%d" % i for i in range(40))


def rebuild(path: Path, **changes: object) -> None:
    raw = raw_manifest(path)
    raw["parts"]["embed"]["build_seconds"] = 7.0
    (path / MANIFEST_NAME).write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_sha256": "1" * 64},
        {"schedule": {"betas": [0.1, 0.3]}},
        {"files": {"parts/embed.onnx": {"sha256": "1" * 64, "size_bytes": 5}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nothing_is_stored_in_a_bundle_that_became_another(path: Path, changes: dict[str, object]) -> None:
    bundle = open_bundle(path)
    rebuild(path, **changes)
    before = (path / MANIFEST_NAME).read_bytes()
    with pytest.raises(BundleError, match="was replaced by another bundle meanwhile"):
        store_in_bundle(bundle, "calibration/ddim.json", b"{}")
    assert (path / MANIFEST_NAME).read_bytes() == before
    assert not (path / "calibration").exists()


def test_a_bundle_that_was_built_again_alike_is_still_the_same(path: Path) -> None:
    bundle = open_bundle(path)
    rebuild(path)
    after, _ = store_in_bundle(bundle, "calibration/ddim.json", b"{}")
    assert after.manifest.parts["embed"].build_seconds == 7.0
    assert list(stored(path).values()) == [b"{}"]


KILLED = """
import os, signal, sys
from pathlib import Path
from adacorr_deploy.core import bundle

path, when = Path(sys.argv[1]), sys.argv[2]
replace_file = bundle.replace_file

def killed(target, content):
    if target.name == when:
        os.kill(os.getpid(), signal.SIGKILL)
    replace_file(target, content)
    if when == "the end" and target.name == "manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)

bundle.replace_file = killed
bundle.store_in_bundle(bundle.open_bundle(path), "calibration/ddim.json", b"new")
"""


@pytest.mark.parametrize(("when", "left"), [(MANIFEST_NAME, b"old"), ("the end", b"new")])
def test_a_bundle_opens_whenever_a_store_was_killed(path: Path, when: str, left: bytes) -> None:
    store_in_bundle(open_bundle(path), "calibration/ddim.json", b"old")
    ended = subprocess.run([sys.executable, "-c", KILLED, path, when], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list((path / "calibration").iterdir())) == 2  # it left something, which is not read
    assert list(stored(path).values()) == [left]
    store_in_bundle(open_bundle(path), "calibration/ddim.json", b"next")
    assert list(stored(path).values()) == [b"next"]


@pytest.mark.parametrize("relative", ["../x", "/tmp/x", "calibration/../../x", "", "."])
def test_nothing_is_stored_outside_the_bundle(path: Path, relative: str) -> None:
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        store_in_bundle(open_bundle(path), relative, b"")
    assert not (path.parent / "x").exists()


def test_nothing_is_stored_through_a_link_that_leaves(path: Path) -> None:
    (path / "calibration").symlink_to(path.parent)
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        store_in_bundle(open_bundle(path), "calibration/x", b"")
    assert not (path.parent / "x").exists()


@pytest.mark.parametrize("failing", ["ddim", "manifest"])
@pytest.mark.parametrize("done", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_store_leaves_the_bundle_as_it_was_or_as_it_should_be(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, done: bool, error: BaseException, existed: bool
) -> None:
    bundle = open_bundle(path)
    if existed:
        bundle, _ = store_in_bundle(bundle, "calibration/ddim.json", b"before")

    def full_disk(target: Path, content: bytes) -> None:
        if done or not target.name.startswith(failing):
            replace_file(target, content)
        if target.name.startswith(failing):
            raise error

    monkeypatch.setattr(bundle_module, "replace_file", full_disk)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        store_in_bundle(bundle, "calibration/ddim.json", b"after")
    expected = [b"after"] if done and failing == "manifest" else [b"before"] * existed
    assert list(stored(path).values()) == expected
    assert [file.read_bytes() for file in (path / "calibration").iterdir()] == expected


def test_nothing_is_written_through_a_link_that_waits_for_it(path: Path) -> None:
    """As a bundle from elsewhere could hold for every process id."""
    (path.parent / "precious").write_bytes(b"precious")
    (path / f".{MANIFEST_NAME}.{os.getpid()}.part").symlink_to(path.parent / "precious")
    store_in_bundle(open_bundle(path), "calibration/ddim.json", b"{}")
    assert (path.parent / "precious").read_bytes() == b"precious"
    assert list(stored(path).values()) == [b"{}"]


def test_a_replaced_file_leaves_no_partial_one_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    replace_file(target, b"old")
    monkeypatch.setattr(Path, "replace", lambda self, other: Path("/nowhere").stat())
    with pytest.raises(OSError, match="nowhere"):
        replace_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
