"""A manifest is untrusted: whatever is wrong in it, the error is a BundleError that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import SCHEMA_VERSION, Manifest, bundle_path, manifest_from_json
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import DType, PartSpec, TensorSpec
from tests.models import model_spec

Raw = dict[str, Any]


def manifest() -> Manifest:
    tensor = TensorSpec(name="tokens", dtype=DType.FLOAT16, shape=("rows", 4, 8))
    part = PartSpec(name="embed", inputs=(tensor,), outputs=(tensor,))
    record = {"spec": part, "onnx": "parts/embed.onnx", "artefact": "parts/embed.onnx", "build_seconds": 0.5}
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model_name="tiny",
        model=model_spec(precision=DType.FLOAT16, num_classes=2),
        checkpoint_sha256="0" * 64,
        schedule=NoiseSchedule(betas=(0.1, 0.2), variance_type="fixed_large"),
        backend="onnxruntime",
        parts={"embed": record},  # type: ignore[dict-item]  # validated by pydantic
        files={"parts/embed.onnx": {"sha256": "1" * 64, "size_bytes": 3}},  # type: ignore[dict-item]
        tool_versions={"onnx": "1.23"},
        class_names=("boot", "bag"),
    )


def test_a_manifest_survives_its_own_json() -> None:
    assert manifest_from_json(manifest().model_dump_json(), where="b") == manifest()


def set_(raw: Raw, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for key in parents:
        raw = raw[key]
    raw[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", 1, "schema version 1, this release reads 3"),
        ("schema_version", None, "schema version None"),
        ("schema_version", True, "schema version True"),
        ("checkpoint_sha256", "xyz", "checkpoint_sha256"),
        ("model/precision", "float8", "model.precision"),
        ("model/latents/patch", [2, 0], "model.latents: shape and patch are"),
        ("model/latents/largest", [4, 3], "model.latents: width goes from"),
        ("model/conditions/num_classes", "many", "model.conditions.num_classes"),
        ("model/conditions/num_classes", 10**30, "num_classes is 10*, allowed are 0 … 1048576"),
        ("model/width", 2**40, "width .* 1099511627776 .* allowed are 1 … 65536"),
        ("model/width", -16, "width .* -16 .* allowed are 1 … 65536"),
        ("model/norm_epsilon", -1, "norm_epsilon .* -1.0, allowed are .* more than 0, at most 1"),
        ("schedule/betas", [0.1, 2.0], r"schedule: betas\[1\] is 2.0"),
        ("schedule/betas", [], "schedule: betas: got 0 values"),
        ("schedule/variance_type", "learned", "schedule.noise.variance_type"),
        ("parts/embed", {}, "parts.embed"),
        ("files", [], "files"),
        ("surprise", 1, "surprise: Extra inputs are not permitted"),
        ("class_names", ["boot"], "class_names holds 1 names, the model has 2 classes"),
        ("class_names", ["boot", "bag", "hat"], "class_names holds 3 names, the model has 2 classes"),
        ("class_names", ["boot", "b\x1b[31mag"], r"class_names.1: .* holds control characters"),
        ("class_names", ["boot", "b" * 257], r"class_names.1: .* has 257 characters, allowed are 256"),
        ("model_name", "m" * 257, r"model_name: .* has 257 characters, allowed are 256"),
        ("model_name", "two\nlines", r"model_name: .* holds control characters"),
        ("tool_versions", {"onnx": "1\r2"}, r"tool_versions.onnx: .* holds control characters"),
        (
            "files",
            {f"parts/{i}": {"sha256": "0" * 64, "size_bytes": 0} for i in range(100_001)},
            "files.*at most 100000 items",
        ),
        ("files", {"x" * 1025: {}}, "files.*at most 1024 characters"),
    ],
)
def test_a_bad_field_is_named(path: str, value: object, message: str) -> None:
    raw: Raw = json.loads(manifest().model_dump_json())
    set_(raw, path, value)
    with pytest.raises(BundleError, match=message) as caught:
        manifest_from_json(json.dumps(raw), where="b")
    assert "Rebuild" in str(caught.value)


@pytest.mark.parametrize("place", ["model_name", "schema_version", "\x1b[2J\x07", "checkpoint_sha256", "backend"])
def test_what_a_manifest_holds_never_moves_the_cursor_or_fills_the_screen(place: str) -> None:
    raw: Raw = json.loads(manifest().model_dump_json())
    raw[place] = "\x1b[31m\x9b\u202e\r\n" + "x" * 100_000
    with pytest.raises(BundleError) as caught:
        manifest_from_json(json.dumps(raw), where="b")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", ["parts//embed.onnx", "./parts/embed.onnx", "parts/./embed.onnx", "parts/embed.onnx/"])
def test_a_file_has_one_path_only(path: str) -> None:
    with pytest.raises(ValueError, match="not in its shortest form"):
        bundle_path(path)


LEAVING = ["../x", "parts/../../x", "/etc/passwd", "", ".", "..", "parts\\..\\x", "C:/x", "a\0b", "a\nb"]


@pytest.mark.parametrize("path", LEAVING)
@pytest.mark.parametrize("place", ["onnx", "artefact", "files"])
def test_no_path_leaves_the_bundle(path: str, place: str) -> None:
    raw: Raw = json.loads(manifest().model_dump_json())
    if place == "files":
        raw["files"][path] = raw["files"]["parts/embed.onnx"]
    else:
        raw["parts"]["embed"][place] = path
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        manifest_from_json(json.dumps(raw), where="b")


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b.c"]), max_size=5).map("/".join))
def test_an_accepted_path_stays_below_its_folder(path: str) -> None:
    try:
        accepted = bundle_path(path)
    except ValueError:
        return
    depth = 0
    for part in accepted.split("/"):
        depth += {"": 0, ".": 0, "..": -1}.get(part, 1)
        assert depth >= 0
    assert depth > 0
    assert not accepted.startswith("/")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"x"', "[" * 100_000, '{"schema_version": 2}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match=r"not JSON|schema version|Field required"):
        manifest_from_json(text, where="b")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["model", "schedule", "parts", "files", "class_names", "tool_versions"]),
)
@settings(max_examples=50, deadline=None)
def test_garbage_in_a_field_never_fails_otherwise(value: object, field: str) -> None:
    raw: Raw = json.loads(manifest().model_dump_json())
    raw[field] = value
    try:
        manifest_from_json(json.dumps(raw), where="b")
    except BundleError:
        return
    assert field in ("parts", "files", "class_names", "tool_versions")  # whose empty forms are valid here


@pytest.mark.parametrize("units", [(2,), (8, 8, 4), (1, 1), (1,) * 56])
def test_parts_of_whole_blocks_or_of_halves_are_accepted(units: tuple[int, ...]) -> None:
    model = model_spec(units=units, num_classes=2)
    text = manifest().model_copy(update={"model": model}).model_dump_json()
    assert manifest_from_json(text, where="here").model.units == units


@pytest.mark.parametrize("units", [(), (0,), (-2, 6), (3, 1), (1, 1, 2), (1, 1, 1), (2,), (2, 2, 2), (4, 4)])
def test_parts_that_no_model_has_are_refused(units: tuple[int, ...]) -> None:
    raw = json.loads(manifest().model_copy(update={"model": model_spec(units=(2, 2), num_classes=2)}).model_dump_json())
    raw["model"]["units"] = units
    with pytest.raises(BundleError, match=r"model: .*allowed"):
        manifest_from_json(json.dumps(raw), where="here")
