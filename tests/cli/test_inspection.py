"""Inspecting a bundle shows what its manifest says, and only after every hash was checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from adacorr_deploy.core.bundle import open_bundle
from tests.cli.conftest import Command


def test_every_part_is_listed_with_its_artefact_bytes_and_hash(command: Command, bundle: Path) -> None:
    document = command("build", "--inspect", str(bundle), "--json").json
    manifest = open_bundle(bundle).manifest
    parts = document["parts"]
    assert isinstance(parts, list)
    assert [part["name"] for part in parts] == list(manifest.parts)
    for part in parts:
        record = manifest.files[manifest.parts[part["name"]].artefact]
        assert (part["bytes"], part["sha256"]) == (record.size_bytes, record.sha256)
    assert document["engines"] is None  # ONNX Runtime opens the ONNX files themselves
    assert document["bytes"] == sum(record.size_bytes for record in manifest.files.values())


def test_the_table_says_where_the_time_of_the_build_went(command: Command, bundle: Path) -> None:
    outcome = command("build", "--inspect", str(bundle))
    assert outcome.code == 0
    for words in ("block_00", "exporting", "compiling", "checkpoint sha256", "every hash as listed"):
        assert words in outcome.stdout


def test_engines_are_listed_with_version_targets_and_sizes(command: Command, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ("--backend", "tensorrt-rtx", "--gpu", "sm_89", "--batch", "1,2,4", "--weights", "inputs")
    assert command("build", str(model), "-o", str(tmp_path / "b"), *options, "--policy", "none").code == 0
    document = command("build", "--inspect", str(tmp_path / "b"), "--json").json
    engines = document["engines"]
    assert isinstance(engines, dict)
    assert (engines["targets"], engines["weights"], engines["profile"]["batch"]) == (["sm_89"], "inputs", [1, 2, 4])
    shown = command("build", "--inspect", str(tmp_path / "b")).stdout
    assert "for sm_89, weights inputs; batch 1–4 (tuned for 2)" in shown


@pytest.mark.parametrize("arguments", [("demo",), ("-o", "elsewhere")], ids=["a model", "an output"])
def test_it_builds_nothing_so_it_takes_nothing_to_build(
    command: Command, bundle: Path, arguments: tuple[str, ...]
) -> None:
    assert "takes no MODEL and no --output" in command("build", "--inspect", str(bundle), *arguments).error


def test_a_folder_that_is_no_bundle_and_an_altered_one_are_refused(
    command: Command, bundle: Path, tmp_path: Path
) -> None:
    assert "is not a bundle" in command("build", "--inspect", str(tmp_path)).error
