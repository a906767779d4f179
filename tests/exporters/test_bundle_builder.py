"""A build leaves a whole bundle at its output, or the output and the folder around it as they were."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from adacorr_deploy.core.bundle import Bundle, open_bundle, replace_file, store_in_bundle
from adacorr_deploy.core.errors import BundleError, CheckpointError, EngineError, OutputError, PolicyError
from adacorr_deploy.core.manifest import MANIFEST_NAME, file_record
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Artefact
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters import LoadedModel, bundle_builder
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle, check_output
from adacorr_deploy.exporters.onnx_parts import export_parts
from tests.exporters.conftest import loaded, random_dit

OPTIONS = BuildOptions(segment=3)
OVERWRITE = replace(OPTIONS, overwrite=True)
BACKEND = OnnxRuntimeBackend(threads=1)
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(random_dit())


@pytest.fixture(scope="module", autouse=True)
def exported_once(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, PartSpec]]:
    """Exporting takes seconds, and test_onnx_parts holds what it writes: here the same files are copied each time."""
    parts = tmp_path_factory.mktemp("parts")
    specs = export_parts(model, parts, segment=3)

    def copy_parts(
        loaded: LoadedModel, directory: Path, precision: DType, segment: int, progress: Progress | None
    ) -> dict[str, PartSpec]:
        for done, name in enumerate(specs):
            if progress is not None:
                progress(name, done, len(specs))
            for file in parts.glob(f"{name}.*"):
                shutil.copy(file, directory)
        return dict(specs)

    return copy_parts


@pytest.fixture(autouse=True)
def _exporting(exported_once: Callable[..., dict[str, PartSpec]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_builder, "export_parts", exported_once)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "bundle"


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir()) if output.parent.exists() else []


class FailingBackend(OnnxRuntimeBackend):
    """Fails at the part called `head`, after half of its artefact is on the disk."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(threads=1)
        self._error = error

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        if spec.name == "head":
            artefact_dir.mkdir(parents=True, exist_ok=True)
            (artefact_dir / "head.plan").write_bytes(b"half")
            raise self._error
        return super().build(onnx_path, spec, artefact_dir)


def build_failing(
    place: str, error: BaseException, model: LoadedModel, output: Path, options: BuildOptions = OPTIONS
) -> None:
    def fail_at_head(part: str, done: int, total: int) -> None:
        if part == "head":
            raise error

    def fail(folder: Path) -> None:
        assert (folder / MANIFEST_NAME).is_file()
        raise error

    build_bundle(
        model,
        output,
        FailingBackend(error) if place == "backend" else BACKEND,
        options,
        progress=fail_at_head if place == "progress" else None,
        finish=fail if place == "finish" else None,
    )


@pytest.mark.parametrize("error", [EngineError("no"), KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
@pytest.mark.parametrize("place", ["progress", "backend", "finish"])
def test_what_fails_leaves_nothing_and_keeps_its_error(
    model: LoadedModel, output: Path, place: str, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught:
        build_failing(place, error, model, output)
    assert caught.value is error
    assert beside(output) == []


@pytest.mark.parametrize("error", [EngineError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["progress", "backend", "finish"])
def test_a_failed_replacement_leaves_the_old_bundle(
    model: LoadedModel, output: Path, place: str, error: BaseException
) -> None:
    build_bundle(model, output, BACKEND, OPTIONS)
    before = contents(output)
    with pytest.raises(type(error)):
        build_failing(place, error, model, output, OVERWRITE)
    assert contents(output) == before
    assert beside(output) == ["bundle"]


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()], ids=repr)
def test_a_replacement_that_fails_at_the_last_rename_puts_the_old_bundle_back(
    model: LoadedModel, output: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bundle(model, output, BACKEND, OPTIONS)
    before = contents(output)
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name.endswith(".building"):
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        build_bundle(model, output, BACKEND, OVERWRITE)
    assert contents(output) == before
    assert beside(output) == ["bundle"]


def test_an_interrupt_after_the_last_rename_leaves_the_new_bundle(
    model: LoadedModel, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_bundle(model, output, BACKEND, OPTIONS)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        if path.name.endswith(".building"):
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_bundle(replace(model, name="new"), output, BACKEND, OVERWRITE)
    assert open_bundle(output).manifest.model_name == "new"
    assert beside(output) == ["bundle"]


def test_overwrite_replaces_every_file_of_the_old_bundle(model: LoadedModel, output: Path) -> None:
    old = build_bundle(model, output, BACKEND, OPTIONS)
    store_in_bundle(old, "calibration/old.json", b"{}")
    new = build_bundle(replace(model, name="new"), output, BACKEND, OVERWRITE)
    assert (new.path, new.manifest.model_name) == (output, "new")
    assert set(contents(output)) == {*new.manifest.files, MANIFEST_NAME}
    assert not any(name.startswith("calibration/") for name in new.manifest.files)
    assert beside(output) == ["bundle"]


def test_an_existing_output_is_refused_before_anything_is_exported(model: LoadedModel, output: Path) -> None:
    output.mkdir(parents=True)
    (output / "kept.txt").write_text("mine")
    told: list[str] = []
    for options, reason in ((OPTIONS, "exists. Choose another folder"), (OVERWRITE, "is not a bundle, so --overwrite")):
        with pytest.raises(OutputError, match=reason):
            build_bundle(model, output, BACKEND, options, progress=lambda part, done, total: told.append(part))
    assert told == []
    assert contents(output) == {"kept.txt": b"mine"}
    assert beside(output) == ["bundle"]


def test_two_builds_differ_in_nothing_but_the_time_they_took(model: LoadedModel, tmp_path: Path) -> None:
    bundles = [build_bundle(model, tmp_path / name, BACKEND, OPTIONS) for name in ("one", "two")]
    files = [contents(bundle.path) for bundle in bundles]
    assert all(each.pop(MANIFEST_NAME) for each in files)
    assert files[0] == files[1]
    assert {f"parts/{part}.onnx" for part in bundles[0].manifest.parts} < files[0].keys()
    assert timeless(bundles[0]) == timeless(bundles[1])


def timeless(bundle: Bundle) -> object:
    manifest = bundle.manifest
    parts = {name: part.model_copy(update={"build_seconds": 0.0}) for name, part in manifest.parts.items()}
    return manifest.model_copy(update={"parts": parts, "export_seconds": 0.0})


def test_the_manifest_vouches_for_every_file(model: LoadedModel, output: Path) -> None:
    bundle = build_bundle(model, output, BACKEND, replace(OPTIONS, default_policy="robust@2.5"))
    assert set(bundle.manifest.files) == contents(output).keys() - {MANIFEST_NAME}
    assert all(file_record(output / name) == record for name, record in bundle.manifest.files.items())
    assert bundle.manifest.checkpoint_sha256 == model.checkpoint_sha256
    assert bundle.manifest.default_policy == "robust@2.5"
    assert {"torch", "onnx"} <= bundle.manifest.tool_versions.keys()
    weights = output / "parts" / "head.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match=r"parts/head.safetensors was altered"):
        open_bundle(output)


def test_what_finish_adds_is_in_the_bundle_and_its_manifest(model: LoadedModel, output: Path) -> None:
    def finish(folder: Path) -> None:
        assert not output.exists()
        store_in_bundle(open_bundle(folder), "calibration/mine.json", b"{}")

    bundle = build_bundle(model, output, BACKEND, OPTIONS, finish=finish)
    (stored,) = (name for name in bundle.manifest.files if name.startswith("calibration/mine-"))
    assert bundle.file(stored).read_bytes() == b"{}"


def test_every_part_is_told_exported_and_compiled(model: LoadedModel, output: Path) -> None:
    told: list[tuple[str, int, int]] = []
    bundle = build_bundle(
        model, output, BACKEND, OPTIONS, progress=lambda part, done, total: told.append((part, done, total))
    )
    parts = list(bundle.manifest.parts)
    assert told[-len(parts) - 1 :] == [(name, done, len(parts)) for done, name in enumerate([*parts, ""])]


def test_an_output_that_can_not_be_written_is_an_output_error(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file" / "bundle", tmp_path / ("long" * 80), tmp_path / ("long" * 61)):
        with pytest.raises(OutputError, match=r"can't be written: .* -o"):
            build_bundle(model, output, BACKEND, OPTIONS)
    with pytest.raises(OutputError, match="can't be written: no room"):
        build_failing("backend", OSError("no room"), model, tmp_path / "bundle")
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_what_a_killed_build_of_the_same_process_id_left_is_no_obstacle(model: LoadedModel, output: Path) -> None:
    """In a container every build may be process 1."""
    for kind in ("building", "replaced"):
        left = output.parent / f".bundle.{os.getpid()}.{kind}"
        left.mkdir(parents=True)
        (left / "stale").write_text("stale")
    build_bundle(model, output, BACKEND, OPTIONS)
    build_bundle(model, output, BACKEND, OVERWRITE)
    assert beside(output) == ["bundle"]
    assert "stale" not in contents(output)


def test_check_output_allows_what_build_allows(model: LoadedModel, output: Path) -> None:
    check_output(output, OPTIONS)
    check_output(output, OVERWRITE)
    assert not output.parent.exists()
    build_bundle(model, output, BACKEND, OPTIONS)
    check_output(output, OVERWRITE)
    with pytest.raises(OutputError, match="exists"):
        check_output(output, OPTIONS)


def test_a_bundle_that_appears_meanwhile_stays_as_it_is(model: LoadedModel, output: Path) -> None:
    def finish(folder: Path) -> None:
        build_bundle(replace(model, name="quicker"), output, BACKEND, OPTIONS)

    with pytest.raises(OutputError, match=r"exists\. Choose another folder"):
        build_bundle(model, output, BACKEND, OPTIONS, finish=finish)
    assert open_bundle(output).manifest.model_name == "quicker"
    assert beside(output) == ["bundle"]


def test_a_model_is_called_by_what_can_be_shown_of_its_name(model: LoadedModel, output: Path) -> None:
    bundle = build_bundle(replace(model, name="two\nlines\x1b[31m" + "x" * 300), output, BACKEND, OPTIONS)
    assert bundle.manifest.model_name == "two?lines?[31m" + "x" * 242
    assert open_bundle(output).manifest == bundle.manifest


def test_class_names_are_as_many_as_classes(model: LoadedModel) -> None:
    assert replace(model, class_names=("x",) * 10).class_names == ("x",) * 10  # ImageNet has two cranes
    for count in (0, 9, 11):
        with pytest.raises(CheckpointError, match=f"there are {count} class names, but the model has 10 classes"):
            replace(model, class_names=("x",) * count)


@pytest.mark.parametrize("unlisted", ["parts/head.safetensors", "parts/sub/more.bin", "engines/onnxruntime/head.plan"])
def test_no_bundle_opens_with_a_file_that_its_engines_could_read_unchecked(
    model: LoadedModel, output: Path, unlisted: str
) -> None:
    manifest = build_bundle(model, output, BACKEND, OPTIONS).manifest
    files = {name: record for name, record in manifest.files.items() if name != unlisted}
    replace_file(output / MANIFEST_NAME, manifest.model_copy(update={"files": files}).model_dump_json().encode())
    (output / unlisted).parent.mkdir(parents=True, exist_ok=True)
    (output / unlisted).touch()
    with pytest.raises(BundleError, match=f"'{unlisted}' is not listed"):
        open_bundle(output)


@pytest.mark.parametrize(
    "location", ["../head.safetensors", "../calibration/head.safetensors", "{}/calibration/head.safetensors"]
)
def test_weights_outside_the_folders_that_are_checked_are_refused_by_the_engine(
    model: LoadedModel, output: Path, location: str
) -> None:
    """Such files need not be listed."""
    bundle = build_bundle(model, output, BACKEND, OPTIONS)
    head = bundle.manifest.parts["head"]
    location = location.format(output)
    graph = onnx.load(bundle.file(head.onnx), load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (output / "calibration").mkdir()
    shutil.copy(output / "parts/head.safetensors", output / "parts" / location)
    onnx.save(graph, bundle.file(head.onnx))
    with pytest.raises(EngineError, match=r"head: .*External data path"):
        BACKEND.open(Artefact(path=bundle.file(head.artefact)), head.spec)


@pytest.mark.parametrize("name", ["mine.toml", "../robust", "robust@", "none@2", "robust@99", "robust@2\n", ""])
def test_a_default_policy_must_be_a_preset(name: str) -> None:
    with pytest.raises(PolicyError):
        BuildOptions(default_policy=name)
