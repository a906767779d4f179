"""Invariant: a build gives a whole bundle, or one line that says why not and nothing on the disk."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adacorr_deploy.caching.calibration import CalibrationKey
from adacorr_deploy.cli.build import Precision
from adacorr_deploy.cli.calibrate import calibrate_for_policies
from adacorr_deploy.cli.model_source import path_from_model
from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.errors import CheckpointError, PolicyError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters.bundle_builder import BuildOptions
from adacorr_deploy.quality.calibrate import CalibrationOptions
from tests.cli.conftest import Command, edit_json, run_main
from tests.cli.full_disk import small_files_only, tiny_disk
from tests.cli.interrupted_process import started

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_without_a_policy_the_default_is_robust(bundle: Path) -> None:
    assert open_bundle(bundle).manifest.default_policy == "robust"


def test_demo_is_the_packaged_model_and_a_folder_of_that_name_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert path_from_model("./demo") == Path("demo")
    assert (path_from_model("demo") / "model_index.json").is_file()
    monkeypatch.setattr("adacorr_deploy.__file__", "/nowhere/adacorr_deploy/__init__.py")
    with pytest.raises(CheckpointError, match=r"holds no demo model .*give a path as MODEL"):
        path_from_model("demo")


def test_calibrate_calibrates_the_bundle_before_it_is_there(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated: list[tuple[Sequence[str], CalibrationOptions]] = []

    def seen(
        folder: Path,
        policies: Sequence[str],
        options: CalibrationOptions,
        advance: Callable[[str, int, int], None],
        *,
        backend: str | None,
    ) -> list[tuple[Path, CalibrationKey]]:
        calibrated.append((policies, options))
        assert not (tmp_path / "made.bundle").exists()
        return calibrate_for_policies(folder, policies, options, advance, backend=backend)

    monkeypatch.setattr("adacorr_deploy.cli.new_bundle.calibrate_for_policies", seen)
    output = tmp_path / "made.bundle"
    assert command("build", model, "-o", output, "--calibrate", "--policy", "scheduled-blocks@3").code == 0
    ((policies, options),) = calibrated
    assert policies == ["scheduled-blocks@3"]  # whose predictor is not that of robust, which the default would be
    assert (options.sampler, options.steps, options.guidance) == (None, 50, 4.0)
    assert any(name.startswith("calibration/ddim-50-4") for name in open_bundle(output).manifest.files)
    assert names(tmp_path) == ["made.bundle"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "robust"], "needs a calibration, which this build leaves out. Add --calibrate, or .* fora"),
        (["--policy", "scheduled@2", "--no-calibrate"], "needs a calibration"),
        (["--policy", "teacache"], "policy teacache needs a profile, which this build leaves out. Add --calibrate"),
        (["--policy", "fora+adacorrection"], "needs a calibration, which this build leaves out"),
        (["--policy", "nix"], r"policy 'nix' is neither a preset \(none, "),
        (["--policy", "fora@0"], "greater than or equal to 1"),
        (["--backend", "abacus"], "no backend called 'abacus'. Known: onnxruntime"),
        (["--precision", "int3"], "'int3' is not one of 'fp32', 'fp16'.* See: .* --help"),
        (["--segment", "0"], "Invalid value for '--segment'"),
        (["--segment", "1001"], "Invalid value for '--segment': .* 1000"),
        (["--halves", "--segment", "2"], "Invalid value for --halves: an engine holds a half of a block, or a"),
        (["--heads", "1025"], "Invalid value for '--heads': .* 1024"),
        (["--scheduler", ""], "Invalid value for '--scheduler': it is empty"),
        (["-o", ""], "Invalid value for '--output' / '-o': it is empty"),
    ],
)
def test_bad_options_are_refused_before_work_starts(
    command: Command, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, command("build", model, "-o", tmp_path / "made.bundle", *arguments).error)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["mine.json", "robust@2/../x", "robust@1_0", "nix"])
def test_a_bundles_default_policy_is_a_preset_and_no_path(name: str) -> None:
    with pytest.raises(PolicyError, match=r"can't be a bundle's default policy. Known: none, "):
        BuildOptions(default_policy=name)


@pytest.mark.parametrize("name", ["taylorseer-2@4", "robust@2.5", "teacache@0.3+adacorrection@2"])
def test_every_preset_its_knob_and_a_correction_on_top_can_be_the_default(name: str) -> None:
    assert BuildOptions(default_policy=name).default_policy == name


def test_what_is_missing_is_named(command: Command, model: Path, tmp_path: Path) -> None:
    assert "Invalid value for --output: it is missing" in command("build", model).error
    assert "Invalid value for MODEL: it is missing" in command("build", "-o", tmp_path / "made.bundle").error


def test_precisions_are_the_types_they_say() -> None:
    assert [precision.dtype for precision in Precision] == [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16]


# --- Checkpoints -------------------------------------------------------------------------------------------------


def truncated(model: Path) -> Path:
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-100])
    return model


def missing(model: Path) -> Path:
    return model / "nowhere"


def without_weights(model: Path) -> Path:
    (model / WEIGHTS).unlink()
    return model


def renamed_weight(model: Path) -> Path:
    state = load_file(model / WEIGHTS)
    state["proj_out_3.weight"] = state.pop("proj_out_2.weight")
    save_file(state, model / WEIGHTS)
    return model


def unknown_class(model: Path) -> Path:
    edit_json(model / "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    return model


def no_state_dict(model: Path) -> Path:
    torch.save(["not", "weights"], model / "list.pt")
    return model / "list.pt"


def truncated_pickle(model: Path) -> Path:
    torch.save({"weight": torch.ones(5000)}, model / "cut.pt")
    (model / "cut.pt").write_bytes((model / "cut.pt").read_bytes()[:3000])
    return model / "cut.pt"


def bare_transformer(model: Path) -> Path:
    return model / "transformer"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, "nowhere doesn't exist. Give a diffusers folder"),
        (without_weights, "holds no diffusion_pytorch_model.safetensors"),
        (truncated, "is truncated or no safetensors file"),
        (renamed_weight, "1 missing: proj_out_2.weight; 1 unexpected: proj_out_3.weight"),
        (unknown_class, "no exporter knows the class 'FluxTransformer2DModel'. Known: DiTTransformer2DModel"),
        (no_state_dict, "list.pt holds a list, not a state dict"),
        (truncated_pickle, "cut.pt can't be loaded as tensors alone"),
        (bare_transformer, "comes without a scheduler. .* --scheduler"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(
    command: Command, own_model: Path, tmp_path: Path, damage: Callable[[Path], Path], message: str
) -> None:
    output = tmp_path / "out" / "made.bundle"
    assert re.search(message, command("build", damage(own_model), "-o", output).error)
    assert not output.parent.exists()


# --- Output ------------------------------------------------------------------------------------------------------


def test_overwrite_replaces_a_bundle_and_json_says_by_what(command: Command, model: Path, own_bundle: Path) -> None:
    (own_bundle / "manifest.json").write_text("{}")  # replaced even if it no longer opens
    options = ["--precision", "fp16", "--segment", 2, "--policy", "fora@2", "--overwrite", "--json"]
    found = command("build", model, "-o", own_bundle, *options).json
    assert list(found) == ["bundle", "model", "backend", "precision", "parts", "bytes", "seconds"]
    manifest = open_bundle(own_bundle).manifest
    assert found | {"seconds": 0} == {
        "bundle": str(own_bundle),
        "model": "tiny",
        "backend": "onnxruntime",
        "precision": "fp16",
        "parts": len(manifest.parts),
        "bytes": sum(record.size_bytes for record in manifest.files.values()),
        "seconds": 0,
    }
    assert (manifest.model.precision, manifest.model.units) == (DType.FLOAT16, (4, 2))
    assert manifest.default_policy == "fora@2"
    assert names(own_bundle.parent) == ["own.bundle"]


def test_halves_are_two_parts_for_each_block_and_sample_the_same(
    command: Command, model: Path, own_bundle: Path, tmp_path: Path
) -> None:
    output = tmp_path / "halves.bundle"
    assert command("build", model, "-o", output, "--halves", "--policy", "fora").code == 0
    inspected = command("build", "--inspect", output).stdout
    assert re.findall(r"block_\d\d_\w+", inspected)[::2] == [
        f"block_{block:02d}_{half}" for block in range(3) for half in ("attention", "mlp")
    ]
    latents = []
    for bundle in (own_bundle, output):
        saved = tmp_path / f"{bundle.stem}.npy"
        ran = command("run", bundle, "--policy", "none", "--steps", 3, "--save-latents", saved)
        assert ran.code == 0
        latents.append(np.load(saved))
    np.testing.assert_allclose(latents[0], latents[1], rtol=1e-4, atol=1e-4)


def test_without_overwrite_what_stands_at_the_output_stays(command: Command, model: Path, own_bundle: Path) -> None:
    error = command("build", model, "-o", own_bundle).error
    assert "exists. Choose another folder with -o, remove it, or give --overwrite." in error
    assert open_bundle(own_bundle).manifest.model_name == "tiny"
    assert names(own_bundle.parent) == ["own.bundle"]


def test_overwrite_replaces_nothing_but_a_bundle(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "is not a bundle, so --overwrite leaves it alone" in (
        command("build", model, "-o", tmp_path, "--overwrite").error
    )
    assert names(tmp_path) == ["thesis.tex"]


def test_overwrite_does_not_replace_what_is_read(command: Command, model: Path, own_bundle: Path) -> None:
    source = shutil.copytree(model, own_bundle / "source")
    error = command("build", source, "-o", own_bundle, "--overwrite").error
    assert f"{own_bundle} holds the input {source} and would replace it" in error
    assert (source / "model_index.json").is_file()


def test_an_output_below_a_file_is_refused(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "can't be written" in command("build", model, "-o", tmp_path / "file" / "made.bundle").error


def test_a_full_disk_is_one_line_and_leaves_nothing(command: Command, model: Path, tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", size_kib=40):
        error = command("build", model, "-o", tmp_path / "disk" / "made.bundle").error
        assert re.search("can't be written: .* Free some space or choose another", error)
        assert names(tmp_path / "disk") == []


def test_a_failed_write_is_one_line_and_leaves_nothing(command: Command, model: Path, tmp_path: Path) -> None:
    with small_files_only(10_000):
        assert "can't be written" in command("build", model, "-o", tmp_path / "made.bundle").error
    assert names(tmp_path) == []


# --- Interruption ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing_and_can_be_run_again(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "made.bundle"
    for progress in ("parts/*.onnx", "manifest.json"):  # while it exports, and while it calibrates
        terminal = started("build", model, "-o", output, "--calibrate")
        terminal.wait_for_file(tmp_path, f".made.bundle.*.building/{progress}")
        code, shown = terminal.stop(signal.SIGINT)
        assert code == 130
        assert "Traceback" not in shown
        assert shown.splitlines()[-1].strip().endswith("interrupted")
        assert names(tmp_path) == []
    assert run_main("build", model, "-o", output) == 0
    assert open_bundle(output).manifest.model_name == "tiny"
