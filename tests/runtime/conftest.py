"""A bundle of the tiny DiT on disk, opened with the fake backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adacorr_deploy.core.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, PartRecord, file_record
from adacorr_deploy.runtime import Pipeline
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import SCHEDULE, TinyDiT


def write_bundle(path: Path, model: TinyDiT) -> Path:
    """Write a bundle whose part files hold just their names."""
    (path / "parts").mkdir(parents=True)
    records = {}
    for name, (spec, _) in model.parts().items():
        (path / "parts" / f"{name}.onnx").write_text(name)
        file = f"parts/{name}.onnx"
        records[name] = PartRecord(spec=spec, onnx=file, artefact=file, build_seconds=0.0)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model_name="tiny",
        model=model.spec,
        checkpoint_sha256="0" * 64,
        schedule=SCHEDULE,
        backend="fake",
        parts=records,
        files={record.onnx: file_record(path / record.onnx) for record in records.values()},
        tool_versions={},
    )
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return path


@pytest.fixture(scope="session")
def model() -> TinyDiT:
    return TinyDiT()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, model: TinyDiT) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny", model)


@pytest.fixture
def backend(model: TinyDiT) -> FakeBackend:
    return FakeBackend.of(model)


@pytest.fixture
def pipeline(bundle: Path, backend: FakeBackend) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, backend=backend) as opened:
        yield opened
