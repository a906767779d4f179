"""A bundle opens only as it was built."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adacorr_deploy.core import bundle as bundle_module
from adacorr_deploy.core.bundle import Bundle, open_bundle, store_in_bundle
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import MANIFEST_NAME, Manifest
from tests.core.small_bundle import raw_manifest, write_bundle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


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
    raw = raw_manifest(path)
    raw["files"]["x" * 300] = raw["files"]["parts/embed.onnx"]
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, "can't be read")


@pytest.mark.parametrize("place", ["onnx", "artefact"])
def test_a_part_without_a_hash_is_refused(path: Path, place: str) -> None:
    raw = raw_manifest(path)
    (path / "parts/other.onnx").write_bytes(b"unlisted")
    raw["parts"]["embed"][place] = "parts/other.onnx"
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, r"parts/other\.onnx is used by a part but has no hash")


@pytest.mark.parametrize("place", ["onnx", "artefact", "weights"])
@pytest.mark.parametrize("relative", ["embed.onnx", "calibration/embed.onnx"])
def test_a_part_where_unlisted_files_may_lie_is_refused(path: Path, place: str, relative: str) -> None:
    raw = raw_manifest(path)
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
    raw = raw_manifest(path)
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


def test_who_gives_no_bundle_is_told_to_build_one_where_nothing_stands(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"adacorr-build MODEL -o {tmp_path}/free$"):
        open_bundle(tmp_path / "free")
    (tmp_path / "model").mkdir()
    with pytest.raises(BundleError, match=r"adacorr-build MODEL -o NEW\.bundle$"):
        open_bundle(tmp_path / "model")
