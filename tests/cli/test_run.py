"""Invariant: same bundle and seed, same files; or one line that says why not, and no file at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adacorr_deploy.core.manifest import SCHEMA_VERSION
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.request import NoiseStream
from tests.cli.conftest import SIDE, STEPS, Command, edit_manifest
from tests.cli.full_disk import small_files_only, tiny_disk
from tests.cli.interrupted_process import started
from tests.test_import_time import BUILD_TIME_ONLY

SHAPE = (3, 1, SIDE, SIDE)  # of the default labels' latents
NAMES = ["00_t-shirt-top_seed0.png", "01_trouser_seed0.png", "02_bag-small_seed0.png"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_json_names_one_picture_per_class_and_the_trace_agrees(command: Command, bundle: Path, tmp_path: Path) -> None:
    output, trace = tmp_path / "new" / "images", tmp_path / "new" / "trace.json"
    found = command("run", bundle, "--steps", STEPS, "--trace", trace, "-o", output, "--json").json
    assert list(found) == ["images", "steps", "rho", "launches", "seconds"]
    assert found["images"] == [str(output / name) for name in NAMES]
    assert sorted(contents(output)) == [*NAMES, "grid.png"]
    assert {Image.open(output / name).size for name in NAMES} == {(SIDE, SIDE)}
    records = json.loads(trace.read_text())["records"]
    assert len(records) == STEPS * 3 * 2  # blocks, branches
    assert set(records[0]) == {"step", "block", "branch", "action", "reason", "score", "weight", "age"}
    assert found["launches"] == sum(record["action"] != "reuse" for record in records) / 2
    assert found["rho"] == 1 - float(str(found["launches"])) / (STEPS * 3)
    assert 0 < float(str(found["rho"])) < 1  # the bundle's default policy, and its calibration, were used


def test_without_json_a_person_reads_a_table(command: Command, bundle: Path, tmp_path: Path) -> None:
    found = command("run", bundle, "--steps", STEPS, "-o", tmp_path / "images")
    assert found.code == 0
    assert re.search(r"^ robust +8 +0\.\d+ +\d+ +\d", found.stdout, re.MULTILINE)
    assert f"3 images and {tmp_path / 'images' / 'grid.png'}" in found.stdout
    assert found.stderr == ""  # no terminal, no progress bar


def test_same_seed_same_bytes_and_another_seed_other_images(command: Command, bundle: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        command("run", bundle, "--policy", "fora", "--steps", 6, "--seed", seed, "-o", tmp_path / name)
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert len(first) == 4
    assert not set(first.values()) & set(other.values())


def test_a_bundle_whose_name_is_no_text_runs(command: Command, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"b\xff")
    shutil.copytree(bundle, path)
    output = tmp_path / os.fsdecode(b"o\xff")
    found = command("run", path, "--policy", "none", "--steps", 2, "-o", output, "--json").json
    assert found["images"] == [str(output / name) for name in NAMES]
    assert sorted(contents(output)) == [*NAMES, "grid.png"]


def test_labels_are_numbers_and_names_in_the_order_given(command: Command, bundle: Path, tmp_path: Path) -> None:
    labels = ["--class-labels", "trouser,0", "--class-labels", "Bag, small", "--class-labels", "1"]
    found = command("run", bundle, "--policy", "none", "--steps", 2, *labels, "-o", tmp_path, "--json").json
    words = ["00_trouser", "01_t-shirt-top", "02_bag-small", "03_trouser"]
    assert found["images"] == [str(tmp_path / f"{word}_seed0.png") for word in words]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp-2m"])
def test_given_latents_take_the_place_of_drawn_ones(
    command: Command, bundle: Path, tmp_path: Path, sampler: str
) -> None:
    start, drawn, given = (tmp_path / f"{name}.npy" for name in ("start", "drawn", "given"))
    np.save(start, NoiseStream(SampleRequest(labels=(0, 1, 2), seed=5), SHAPE[1:]).at(0))
    common = ("run", bundle, "--policy", "none", "--steps", 3, "--seed", 5, "--sampler", sampler)
    assert command(*common, "--save-latents", drawn).code == 0
    assert command(*common, "--save-latents", given, "--latents", start).code == 0
    assert np.load(drawn).shape == SHAPE
    assert np.load(drawn).dtype == np.float32
    assert drawn.read_bytes() == given.read_bytes()
    assert command(*common, "--save-latents", given, "--latents", drawn).code == 0  # what was saved can be given back
    assert drawn.read_bytes() != given.read_bytes()


def test_a_policy_file_and_the_bundles_default_are_taken(command: Command, own_bundle: Path, tmp_path: Path) -> None:
    edit_manifest(own_bundle, default_policy="fora@2")
    by_default = command("run", own_bundle, "--steps", 6, "-o", tmp_path / "a", "--trace", tmp_path / "a.json")
    assert " fora@2 " in by_default.stdout
    (tmp_path / "mine.toml").write_text('name = "mine"\ngate = {kind = "interval", interval = 2}\n')
    assert (
        " mine "
        in command("run", own_bundle, "--steps", 6, "-o", tmp_path / "b", "--policy", tmp_path / "mine.toml").stdout
    )


def test_a_manifests_default_policy_can_not_name_a_file(command: Command, own_bundle: Path, tmp_path: Path) -> None:
    edit_manifest(own_bundle, default_policy="/etc/policy.json")
    assert "default_policy: String should match pattern" in command("run", own_bundle, "-o", tmp_path / "out").error


def test_sampling_loads_no_build_time_package(bundle: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from adacorr_deploy.cli.run import main
try:
    main([{str(bundle)!r}, "--steps", "{STEPS}", "-o", "images", "--json"])
except SystemExit as ended:
    assert ended.code == 0
print("loaded:", sorted(name for name in {BUILD_TIME_ONLY!r} if name in sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "loaded: []"
    assert len(contents(tmp_path / "images")) == 4


# --- Bad requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class-labels", "3"], "label is 3, allowed are whole numbers from 0 to 2"),
        (["--class-labels", "-1"], "label is -1, allowed"),
        (["--class-labels", "shoe"], "'shoe' is neither a whole number from 0 to 2 nor .*: T-shirt/top, Trouser, Bag"),
        (["--class-labels", ""], "class label '' is neither"),
        (["--class-labels", "9" * 5000], "class label '9{99}…9{99}' is neither"),
        (["--steps", "0"], "steps is 0, allowed are whole numbers from 1 to 1000"),
        (["--steps", "0", "--policy", "fewer-steps"], "steps is 0, allowed"),
        (["--steps", "two"], "Invalid value for '--steps'"),
        (["--guidance", "nan"], "guidance is nan, allowed is at least 1"),
        (["--seed", "-1"], "seed is -1, allowed"),
        (["--sampler", "euler"], "'euler' is not one of 'ddim', 'ddpm', 'dpmpp-2m'"),
        (["--sampler", "flow-euler"], "sampler is flow-euler, allowed for this model are ddim, .*FlowMatchEuler"),
        (["--sampler", "lcm", "--policy", "none"], "sampler is lcm, allowed for this model are .*an LCMScheduler"),
        (["--sampler", "dpmpp-2m", "--eta", "0.5"], "eta is 0.5, and sampler is dpmpp-2m: only ddim takes it"),
        (["--eta", "0.5"], "the run's sampler is ddim with eta 0.5, whose noise none can follow"),
        (
            ["--steps", "9"],
            "policy robust needs a calibration; .*steps is 8, the run's is 9.*adacorr-calibrate .*tiny.bundle --sa",
        ),
        (
            ["--sampler", "ddpm"],
            "work with --sampler ddim or dpmpp-2m; these need no calibration: none, fewer-",
        ),
        (["--save-latents", "a.png"], r"Latents are kept as .npy, not as a.png. Give a name that ends in .npy"),
        (["--policy", "nix"], "policy 'nix' is neither a preset"),
        (["--policy", "nowhere.toml"], "policy file nowhere.toml can't be read"),
        (["--polcy", "none"], "No such option: --polcy"),
    ],
)
def test_a_bad_request_is_one_line_and_writes_nothing(
    command: Command, bundle: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert re.search(message, command("run", bundle, "-o", tmp_path / "out", *arguments).error)
    assert list(tmp_path.iterdir()) == []


def with_nan(path: Path) -> None:
    np.save(path, np.full(SHAPE, np.nan, np.float32))


def of_two_images(path: Path) -> None:
    np.save(path, np.zeros((2, *SHAPE[1:]), np.float32))


def no_array(path: Path) -> None:
    Image.new("L", (SIDE, SIDE)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (with_nan, "latents holds 432 values that are NaN or infinite"),
        (
            of_two_images,
            r"in\.npy holds float32 of shape \(2, 1, 12, 12\), this run needs float32 of shape \(3, ",
        ),
        (no_array, r"in\.npy can't be read as latents: it is no array file"),
    ],
)
def test_bad_latents_are_one_line_and_nothing_is_written(
    command: Command, bundle: Path, tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "in.npy"
    write(path)
    error = command("run", bundle, "--policy", "none", "--latents", path, "-o", tmp_path / "out").error
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


# --- Bad bundles -------------------------------------------------------------------------------------------------


def altered(bundle: Path) -> None:
    path = bundle / "parts" / "block_01.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_a_part(bundle: Path) -> None:
    (bundle / "parts" / "head.onnx").unlink()


def other_schema(bundle: Path) -> None:
    edit_manifest(bundle, schema_version=SCHEMA_VERSION + 1)


def leaving_path(bundle: Path) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files={**files, "../secret": next(iter(files.values()))})


def leaving_link(bundle: Path) -> None:
    path = bundle / "parts" / "head.onnx"
    path.rename(bundle.parent / "elsewhere.onnx")
    path.symlink_to(bundle.parent / "elsewhere.onnx")


def no_json(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (altered, r"block_01\.safetensors was altered \(its SHA-256 differs .*\)\. Rebuild"),
        (without_a_part, r"head\.onnx is missing"),
        (other_schema, f"schema version {SCHEMA_VERSION + 1}, this release reads {SCHEMA_VERSION}"),
        (leaving_path, r"'\.\./secret' is not a path inside the bundle"),
        (leaving_link, r"head\.onnx leads outside the bundle"),
        (no_json, r"manifest\.json is not JSON"),
    ],
)
def test_a_bad_bundle_is_one_line(
    command: Command, own_bundle: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(own_bundle)
    for name in ("run", "calibrate", "bench"):
        output = ["-o", own_bundle.parent / "out"] if name == "run" else []
        assert re.search(message, command(name, own_bundle, *output).error)
    assert not (own_bundle.parent / "out").exists()


# --- Output ------------------------------------------------------------------------------------------------------


def test_a_run_that_would_keep_nothing_is_refused(command: Command, bundle: Path) -> None:
    assert "Nothing would be kept" in command("run", bundle).error


def test_latents_that_need_a_vae_are_kept_or_refused(command: Command, own_bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    edit_manifest(own_bundle, model={**manifest["model"], "latents": {"shape": [4, SIDE, SIDE], "patch": [2, 2]}})
    error = command("run", own_bundle, "-o", tmp_path / "out").error
    assert "4 channels: they become images through a VAE, which this bundle doesn't hold. Keep the latents" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{own}/images"], "lies in the bundle"),
        (["-o", "out", "--trace", "{own}/manifest.json"], "lies in the bundle"),
        (["-o", "out", "--trace", "{tmp}/x", "--save-latents", "{tmp}/./x"], "is also the output"),
        (["-o", "{tmp}", "--trace", "{tmp}/01_trouser_seed0.png"], "is also the output"),
        (["-o", "{tmp}/n", "--trace", "{tmp}/n"], "would lie below the output file"),
        (["-o", "{tmp}/full"], "02_bag-small_seed0.png is a folder"),
        (["--latents", "{tmp}/in.npy", "--save-latents", "{tmp}/in.npy"], "would overwrite an input"),
        (["--policy", "{tmp}/p.json", "--save-latents", "{tmp}/p.json"], "would overwrite an input"),
        (["--policy", "l2c@{tmp}/p.json+paper-exact", "--save-latents", "{tmp}/p.json"], "would overwrite an input"),
        (["-o", ""], "Invalid value for '--output' / '-o': it is empty"),
        (["-o", "out", "--trace", ""], "Invalid value for '--trace': it is empty"),
        (["-o", "out", "--policy", ""], "policy '' is neither a preset"),
    ],
)
def test_outputs_that_spoil_something_are_refused_before_sampling(
    command: Command,
    own_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("adacorr_deploy.runtime.sample_with_policy", None)  # calling it would be a TypeError
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / NAMES[2]).mkdir(parents=True)
    np.save(tmp_path / "in.npy", np.zeros(SHAPE, np.float32))
    (tmp_path / "p.json").write_text('{"name": "mine", "gate": {"kind": "none"}}')
    before = sorted(tmp_path.rglob("*"))
    given = [word.format(own=own_bundle, tmp=tmp_path) for word in arguments]
    assert message in command("run", own_bundle, "--steps", STEPS, *given).error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["-o", "--save-latents", "--trace"])
def test_an_output_below_a_file_is_refused_before_sampling(
    command: Command, bundle: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").touch()
    arguments = {"-o": tmp_path / "out", option: tmp_path / "file" / "inside" / "x"}
    error = command("run", bundle, *(word for pair in arguments.items() for word in pair)).error
    assert f"{tmp_path / 'file'} is a file, not a folder" in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(command: Command, bundle: Path, tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", size_kib=8):
        error = command("run", bundle, "--policy", "none", "--steps", 2, "-o", tmp_path / "disk").error
        assert "can't be written: No space left on device. Free some space" in error
        assert contents(tmp_path / "disk") == {}


def test_a_failed_write_keeps_what_was_there(command: Command, bundle: Path, tmp_path: Path) -> None:
    common = ("run", bundle, "--policy", "none", "--steps", 2, "-o", tmp_path, "--seed")
    assert command(*common, 0).code == 0
    before = contents(tmp_path)
    with small_files_only(1000):  # enough for an image, not for the grid
        error = command(*common, 1).error
    assert f"{tmp_path / 'grid.png'} can't be written: File too large" in error
    assert contents(tmp_path) == before


def test_full_standard_output_is_one_line(bundle: Path, tmp_path: Path) -> None:
    script = "from adacorr_deploy.cli.run import main; main()"
    arguments = [str(bundle), "--policy", "none", "--steps", "2", "-o", str(tmp_path / "out"), "--json"]
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [sys.executable, "-c", script, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert found.returncode == 2
    assert found.stderr == "error: Standard output can't be written: No space left on device. Send it elsewhere.\n"


def test_ctrl_c_writes_nothing_and_the_next_run_works(command: Command, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    terminal = started(
        "run", bundle, "--policy", "none", "--steps", 1000, "-o", output, "--class-labels", "0," * 63 + "0"
    )
    terminal.wait_for_text("ρ")  # the progress bar, which a terminal is shown
    code, shown = terminal.stop(signal.SIGINT)
    assert code == 130
    assert shown.splitlines()[-1].strip().endswith("interrupted")
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []
    assert command("run", bundle, "--policy", "none", "--steps", 2, "-o", output).code == 0
