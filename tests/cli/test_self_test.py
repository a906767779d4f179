"""Invariant: `adacorr-run --self-test` says in one line whether engines compute here what the built model did."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from adacorr_deploy.core.bundle import open_bundle, store_in_bundle
from adacorr_deploy.core.golden import GOLDEN_FILE
from tests.cli.conftest import Command, edit_manifest
from tests.quality.altered_bundles import scale_largest_weight

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def golden_name(bundle: Path) -> str:
    (name,) = (name for name in open_bundle(bundle).manifest.files if name.startswith("golden/sample-"))
    return name


def test_a_build_passes_alone_and_writes_nothing(command: Command, bundle: Path, tmp_path: Path) -> None:
    found = command("run", bundle, "--self-test")
    assert found.code == 0, found.stderr
    assert re.fullmatch(
        r"self-test passed with onnxruntime on CPU: \d\.\de-0[5-9] from PyTorch's latents \(relative L2\), "
        r"allowed is 0\.001; \d+\.\d s\n",
        found.stdout,
    )
    assert found.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_float16_passes_by_its_own_tolerance(command: Command, model: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.bundle"
    assert command("build", model, "-o", half, "--precision", "fp16", "--policy", "fora").code == 0
    found = command("run", half, "--self-test", "--json").json
    assert list(found) == ["self_test"]
    tested = found["self_test"]
    assert isinstance(tested, dict)
    assert list(tested) == ["error", "tolerance", "backend", "hardware", "seconds"]
    assert tested["tolerance"] == 0.02
    assert 1e-5 < tested["error"] < 0.02 / 3  # not passed by a hair
    scale_largest_weight(open_bundle(half), "block_01", 10)
    assert "fails its self-test with onnxruntime on CPU" in command("run", half, "--self-test").error


def test_with_an_output_it_comes_first(command: Command, bundle: Path, tmp_path: Path) -> None:
    arguments = ("run", bundle, "--self-test", "--policy", "none", "--steps", 2, "-o", tmp_path / "images")
    shown = command(*arguments).stdout
    assert shown.index("self-test passed") < shown.index("launches") < shown.index("grid.png")
    found = command(*arguments, "--json").json
    assert list(found) == ["images", "steps", "rho", "launches", "seconds", "self_test"]


def test_weights_altered_with_their_hashes_fail_with_the_numbers(
    command: Command, own_bundle: Path, tmp_path: Path
) -> None:
    scale_largest_weight(open_bundle(own_bundle), "block_01", 2)  # a block of a random model adds little
    for output in ([], ["-o", tmp_path / "images", "--policy", "none"]):
        error = command("run", own_bundle, "--self-test", *output).error
        found = re.search(r"model's by (\S+) \(relative L2\), allowed is 0\.001\. Rebuild the bundle for this", error)
        assert found is not None, error
        assert 1e-3 < float(found[1]) < 10
    assert not (tmp_path / "images").exists()
    assert command("run", own_bundle, "--policy", "none", "--steps", 2, "-o", tmp_path / "images").code == 0


def test_a_bundle_without_a_golden_sample_runs_until_one_is_asked_for(
    command: Command, own_bundle: Path, tmp_path: Path, golden_name: str
) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    edit_manifest(own_bundle, files={name: each for name, each in manifest["files"].items() if name != golden_name})
    assert command("run", own_bundle, "--policy", "none", "--steps", 2, "-o", tmp_path / "out").code == 0
    error = command("run", own_bundle, "--self-test").error
    assert "holds 0 golden samples" in error
    assert "Rebuild the bundle with adacorr-build" in error


def test_an_altered_golden_file_does_not_open_and_a_hostile_one_is_one_line(
    command: Command, own_bundle: Path, golden_name: str
) -> None:
    content = (own_bundle / golden_name).read_bytes()
    (own_bundle / golden_name).write_bytes(content.replace(b'"label":1', b'"label":2'))
    assert f"{golden_name} was altered" in command("run", own_bundle, "--self-test").error
    (own_bundle / golden_name).write_bytes(content)
    for hostile in (b"\x80\x04\x95", b'{"label": "\x1b[31m"}', content.replace(b'"label":1', b'"label":9')):
        store_in_bundle(open_bundle(own_bundle), GOLDEN_FILE, hostile)
        assert "Rebuild the bundle with adacorr-build." in command("run", own_bundle, "--self-test").error


def test_a_trace_alone_is_still_nothing_to_keep(command: Command, bundle: Path, tmp_path: Path) -> None:
    error = command("run", bundle, "--self-test", "--trace", tmp_path / "trace.json").error
    assert "Nothing would be kept" in error


def test_a_build_whose_golden_sample_can_not_be_made_leaves_nothing(
    command: Command, own_model: Path, tmp_path: Path
) -> None:
    state = load_file(own_model / WEIGHTS)
    state["proj_out_2.weight"].fill_(3e38)
    save_file(state, own_model / WEIGHTS)
    output = tmp_path / "out" / "made.bundle"
    error = command("build", own_model, "-o", output, "--policy", "fora").error
    assert re.search(r"own: after 4 steps of ddim, .* hold NaN or infinite values\. Check", error)
    assert list(output.parent.iterdir()) == []
