"""A bundle opens only as it was built, and a failed change leaves it as it was."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from adacorr_deploy.core import bundle as bundle_module
from adacorr_deploy.core.bundle import open_bundle, replace_file, store_in_bundle
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import MANIFEST_NAME, Manifest, file_record

SPEC = {"name": "embed", "inputs": [], "outputs": []}
MODEL = {
    "family": "dit",
    "precision": "float32",
    "latent_shape": [1, 4, 4],
    "tokens": 4,
    "width": 8,
    "num_classes": 2,
    "blocks": [1],
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
            "schema_version": 1,
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
    raw["files"]["x" * 5000] = raw["files"]["parts/embed.onnx"]
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, "can't be read")


@pytest.mark.parametrize("place", ["onnx", "artefact"])
def test_a_part_without_a_hash_is_refused(path: Path, place: str) -> None:
    raw = edited(path)
    (path / "parts/other.onnx").write_bytes(b"unlisted")
    raw["parts"]["embed"][place] = "parts/other.onnx"
    (path / MANIFEST_NAME).write_text(json.dumps(raw))
    refused(path, r"parts/other\.onnx is used by a part but has no hash")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"])
def test_a_manifest_that_is_no_json_object_is_refused(path: Path, content: bytes) -> None:
    (path / MANIFEST_NAME).write_bytes(content)
    refused(path, "not JSON|can't be read|schema version")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is not a bundle")
    refused(tmp_path / "nowhere", "is not a bundle")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is not a bundle")


def test_a_stored_file_is_hashed_and_listed(path: Path) -> None:
    bundle = store_in_bundle(open_bundle(path), "calibration/ddim.json", b"{}")
    assert open_bundle(path).manifest == bundle.manifest
    again = store_in_bundle(bundle, "calibration/ddim.json", b"[]")
    assert open_bundle(path).manifest == again.manifest
    assert bundle.file("calibration/ddim.json").read_bytes() == b"[]"


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


@pytest.mark.parametrize("failing", ["calibration/ddim.json", MANIFEST_NAME])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_store_leaves_the_bundle_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException, existed: bool
) -> None:
    bundle = open_bundle(path)
    if existed:
        bundle = store_in_bundle(bundle, "calibration/ddim.json", b"before")
    failures = [error]

    def full_disk(target: Path, content: bytes) -> None:
        if target == path / failing and failures:
            raise failures.pop()
        replace_file(target, content)

    monkeypatch.setattr(bundle_module, "replace_file", full_disk)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        store_in_bundle(bundle, "calibration/ddim.json", b"after")
    assert open_bundle(path).manifest == bundle.manifest
    assert (path / "calibration/ddim.json").exists() is existed


def test_a_replaced_file_leaves_no_partial_one_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    replace_file(target, b"old")
    monkeypatch.setattr(Path, "replace", lambda self, other: Path("/nowhere").stat())
    with pytest.raises(OSError, match="nowhere"):
        replace_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
