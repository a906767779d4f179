"""A bundle opens only as it was built, and a failed change leaves it as it was."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adacorr_deploy.core import bundle as bundle_module
from adacorr_deploy.core.bundle import Bundle, open_bundle, replace_file, store_in_bundle
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, file_record

SPEC = {"name": "embed", "inputs": [], "outputs": []}
MODEL = {
    "family": "dit",
    "precision": "float32",
    "latents": {"shape": [1, 4, 4], "patch": [2, 2]},
    "width": 8,
    "conditions": {"num_classes": 2},
    "blocks": [["attention", "mlp"]],
    "units": [2],
    "learned_variance": False,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle of one part, `parts/embed.onnx`, with its weights beside it."""
    path = tmp_path / "bundle"
    (path / "parts").mkdir(parents=True)
    files = {}
    for name, content in (("parts/embed.onnx", b"graph"), ("parts/embed.safetensors", b"weights")):
        (path / name).write_bytes(content)
        files[name] = file_record(path / name).model_dump()
    part = {"spec": SPEC, "onnx": "parts/embed.onnx", "artefact": "parts/embed.onnx", "build_seconds": 0}
    manifest = Manifest.model_validate(
        {
            "schema_version": SCHEMA_VERSION,
            "model_name": "tiny",
            "model": MODEL,
            "checkpoint_sha256": "0" * 64,
            "schedule": {"betas": [0.1, 0.2]},
            "backend": "fake",
            "parts": {"embed": part},
            "files": files,
            "tool_versions": {},
        }
    )
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return path


def edited(path: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((path / MANIFEST_NAME).read_text())
    return raw


def refused(path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(path)
    assert "adacorr-build" in str(caught.value)


def test_an_untouched_bundle_opens(path: Path) -> None:
    bundle = open_bundle(path)
    assert bundle.file(bundle.manifest.parts["embed"].onnx).read_bytes() == b"graph"


@pytest.mark.parametrize("content", [b"Graph", b"graph!", b""])
def test_an_altered_file_is_refused(path: Path, content: bytes) -> None:
    (path / "parts/embed.onnx").write_bytes(content)
    refused(path, r"parts/embed\.onnx was altered")


def test_a_missing_file_is_refused(path: Path) -> None:
    (path / "parts/embed.safetensors").unlink()
    refused(path, r"parts/embed\.safetensors is missing")


def test_a_folder_in_a_file_s_place_is_refused(path: Path) -> None:
    (path / "parts/embed.onnx").unlink()
    (path / "parts/embed.onnx").mkdir()
    refused(path, r"parts/embed\.onnx is missing")


def test_a_link_that_leaves_the_bundle_is_refused(path: Path) -> None:
    outside = path.parent / "outside.onnx"
    outside.write_bytes(b"graph")  # even with the right content
    (path / "parts/embed.onnx").unlink()
    (path / "parts/embed.onnx").symlink_to(outside)
    refused(path, "leads outside the bundle")


def test_a_linked_folder_that_leaves_the_bundle_is_refused(path: Path) -> None:
    (path / "parts").rename(path.parent / "elsewhere")
    (path / "parts").symlink_to(path.parent / "elsewhere")
    refused(path, "leads outside the bundle")


def test_a_loop_of_links_is_refused(path: Path) -> None:
    (path / "parts/embed.onnx").unlink()
    (path / "parts/embed.onnx").symlink_to("embed.onnx")
    refused(path, r"parts/embed\.onnx (can't be read|is missing)")


def test_a_bundle_that_is_itself_a_link_opens(path: Path) -> None:
    link = path.parent / "latest"
    link.symlink_to(path)
    assert open_bundle(link).path == link


def test_a_name_that_no_file_system_takes_is_refused(path: Path) -> None:
    raw = edited(path)
    raw["files"]["x" * 300] = raw["files"]["parts/embed.onnx"]
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, "can't be read")


@pytest.mark.parametrize("place", ["onnx", "artefact"])
def test_a_part_without_a_hash_is_refused(path: Path, place: str) -> None:
    raw = edited(path)
    (path / "parts/other.onnx").write_bytes(b"unlisted")
    raw["parts"]["embed"][place] = "parts/other.onnx"
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, r"parts/other\.onnx is used by a part but has no hash")


@pytest.mark.parametrize("place", ["onnx", "artefact", "weights"])
@pytest.mark.parametrize("relative", ["embed.onnx", "calibration/embed.onnx"])
def test_a_part_where_unlisted_files_may_lie_is_refused(path: Path, place: str, relative: str) -> None:
    raw = edited(path)
    (path / "calibration").mkdir()
    (path / relative).write_bytes(b"graph")  # could name any file beside it as its weights
    raw["parts"]["embed"][place] = relative
    raw["files"][relative] = raw["files"]["parts/embed.onnx"]
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, f"{relative} is used by a part but lies outside parts and engines")


def unlisted_file(place: Path) -> None:
    place.write_bytes(b"weights")


def unlisted_link(place: Path) -> None:
    place.symlink_to("embed.safetensors")


def dangling_link(place: Path) -> None:
    place.symlink_to("nowhere")


def linked_folder(place: Path) -> None:
    place.symlink_to("/")


def pipe(place: Path) -> None:
    os.mkfifo(place)


@pytest.mark.parametrize("folder", ["parts", "engines", "parts/deep/er", "engines/onnxruntime"])
@pytest.mark.parametrize("make", [unlisted_file, unlisted_link, dangling_link, linked_folder, pipe])
def test_what_an_engine_could_open_unchecked_is_refused(path: Path, folder: str, make: Callable[[Path], None]) -> None:
    """An ONNX file names its external data itself, and the serving side doesn't parse it."""
    (path / folder).mkdir(parents=True, exist_ok=True)
    make(path / folder / "more.bin")
    refused(path, rf"'{folder}/more\.bin' is not listed in manifest\.json")


def test_weights_that_the_manifest_leaves_out_are_refused(path: Path) -> None:
    raw = edited(path)
    del raw["files"]["parts/embed.safetensors"]
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, r"'parts/embed\.safetensors' is not listed")


def test_a_folder_that_can_not_be_listed_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the right to list a folder, what lies in it can be opened by name. Root may always, hence the patch."""
    (path / "parts/closed").mkdir()
    scandir = os.scandir

    def closed(folder: Path) -> Iterator[os.DirEntry[str]]:
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    refused(path, "'parts/closed' is not listed")


def test_what_no_engine_opens_does_not_stop_a_bundle(path: Path) -> None:
    (path / "calibration").mkdir()
    for left in ("calibration/x-0123456789ab.json", "calibration/.x.json.1.part", ".manifest.json.1.part", "notes.txt"):
        (path / left).write_bytes(b"half")
    assert open_bundle(path).manifest.files.keys() == {"parts/embed.onnx", "parts/embed.safetensors"}


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_a_manifest_that_is_no_json_object_is_refused(path: Path, content: bytes) -> None:
    (path / MANIFEST_NAME).write_bytes(content)
    refused(path, "not JSON|can't be read|schema version")


def link_to_zeroes(manifest: Path) -> None:
    manifest.symlink_to("/dev/zero")


def link_to_itself_elsewhere(manifest: Path) -> None:
    (manifest.parent / "real.json").write_text(json.dumps({}))
    manifest.symlink_to("real.json")


def huge(manifest: Path) -> None:
    with manifest.open("wb") as file:
        file.truncate(17 << 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pipe, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (link_to_zeroes, "is a link"),
        (link_to_itself_elsewhere, "is a link"),
        (dangling_link, "is a link"),
        (huge, "larger than"),
    ],
)
def test_a_manifest_that_is_no_small_file_is_refused_and_not_waited_for(
    path: Path, make: Callable[[Path], None], message: str
) -> None:
    (path / MANIFEST_NAME).unlink()
    make(path / MANIFEST_NAME)
    refused(path, f"is not a bundle: its manifest.json can't be read .*{message}")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is not a bundle")
    refused(tmp_path / "nowhere", "is not a bundle")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a bundle")


def test_a_bundle_that_changes_while_it_is_opened_is_looked_at_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, _ = store_in_bundle(open_bundle(path), "calibration/ddim.json", b"{}")
    faults = bundle_module._faults
    calibrated: list[Bundle] = []

    def calibrated_meanwhile(where: Path, manifest: Manifest) -> Iterator[str]:
        if not calibrated:
            calibrated.append(store_in_bundle(before, "calibration/ddim.json", b"[]")[0])
        yield from faults(where, manifest)

    monkeypatch.setattr(bundle_module, "_faults", calibrated_meanwhile)
    assert open_bundle(path).manifest == calibrated[0].manifest != before.manifest


# --- Storing -----------------------------------------------------------------------------------------------------


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
    raw = edited(path)
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


def test_who_gives_no_bundle_is_told_to_build_one_where_nothing_stands(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"adacorr-build MODEL -o {tmp_path}/free$"):
        open_bundle(tmp_path / "free")
    (tmp_path / "model").mkdir()
    with pytest.raises(BundleError, match=r"adacorr-build MODEL -o NEW\.bundle$"):
        open_bundle(tmp_path / "model")
