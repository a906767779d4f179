"""Invariant: rows as the contract names them, on standard output and in a file; bad input before anything is timed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from adacorr_deploy.caching.policy import PRESETS
from tests.cli.conftest import STEPS, Command

QUICK = ("--steps", STEPS, "--images", 3, "--batch", 2, "--rounds", 1)
COLUMNS = ["policy", "steps", "seconds", "speedup", "rho", "efficiency", "psnr_db", "ssim"]


def test_rows_of_json_and_csv_are_the_same(command: Command, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    found = command("bench", bundle, "--policies", "fora, robust@2,fewer-steps@2", *QUICK, "--json", "--csv", path)
    assert found.code == 0, found.stderr
    rows = json.loads(found.stdout)
    assert [list(row) for row in rows] == [COLUMNS] * 4
    assert [row["policy"] for row in rows] == ["none", "fora", "robust@2", "fewer-steps@2"]
    assert [row["steps"] for row in rows] == [STEPS, STEPS, STEPS, STEPS // 2]
    none, fora, *_ = rows
    assert (none["psnr_db"], none["rho"], none["speedup"]) == (None, 0.0, 1.0)  # identical: an infinite PSNR is null
    assert none["ssim"] == pytest.approx(1)
    assert fora["rho"] > 0
    assert isinstance(fora["psnr_db"], float)
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert written == [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in rows]


def test_without_json_a_person_reads_a_table(command: Command, bundle: Path) -> None:
    shown = command("bench", bundle, "--policies", "none", *QUICK).stdout
    assert shown.split()[: len(COLUMNS)] == COLUMNS
    assert re.search(r"^ none +8 +0\.\d+ +1\.000 +0\.000 +\d\.\d+ +– +1\.000$", shown, re.MULTILINE)


def test_list_shows_every_preset_without_a_bundle(command: Command) -> None:
    shown = command("bench", "--list").stdout
    assert [name for name in PRESETS if not re.search(rf"^ {name} ", shown, re.MULTILINE)] == []
    assert re.search(r"^ fora +interval, interval 3 +gated +warmup_steps 2.* no$", shown, re.MULTILINE)
    scheduled = PRESETS["scheduled"]
    assert re.search(rf"^ scheduled .* {scheduled.predictor.label} .* yes$", shown, re.MULTILINE)
    described = json.loads(command("bench", "--list", "--json").stdout)
    assert {preset["name"]: preset["needs_calibration"] for preset in described} == {
        name: policy.needs_calibration for name, policy in PRESETS.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "none,nix"], "policy 'nix' is neither a preset"),
        (["--policies", ", ,"], "policies is empty"),
        (["--policies", "none@2"], "policy none has no target"),
        (["--policies", "fora,scheduled@2", "--steps", "9"], "policy scheduled@2 needs a calibration"),
        (["--policies", "fora", "--steps", "0"], "steps is 0, allowed"),
        (["--policies", "fora", "--seed", "-1"], "seed is -1, allowed"),
        (["--images", "0"], "Invalid value for '--images'"),
        (["--images", "10001"], "Invalid value for '--images': .* 10000"),
        (["--batch", "1025"], "Invalid value for '--batch': .* 1024"),
        (["--rounds", "1001"], "Invalid value for '--rounds': .* 1000"),
        (["--policies", "none", "--steps", STEPS, "--seed", 2**64 - 1], "seed is 18446744073709551623, allowed"),
        (["--csv", "/dev/null/rows.csv"], "/dev/null is a file, not a folder"),
        (["--csv", "BUNDLE/manifest.json"], "lies in the bundle"),
        (["--csv", ""], "Invalid value for '--csv': it is empty"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_timed(
    command: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], message: str
) -> None:
    monkeypatch.setattr("adacorr_deploy.quality.bench.bench", None)  # calling it would be a TypeError
    given = [str(word).replace("BUNDLE", str(bundle)) for word in arguments]
    assert re.search(message, command("bench", bundle, *given).error)


def test_no_bundle_is_a_usage_error(command: Command) -> None:
    assert "Invalid value for BUNDLE: it is missing. Give a bundle's folder, or --list. See: " in command("bench").error
