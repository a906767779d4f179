"""Invariant: rows as the contract names them, on standard output and in a file; bad input before anything is timed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from adacorr_deploy.caching.policy import FILE_PRESETS, PRESETS, Policy
from adacorr_deploy.cli.policy_table import show_policies
from adacorr_deploy.quality import bench_sampling
from adacorr_deploy.quality.bench_rows import COLUMNS
from adacorr_deploy.quality.bench_sampling import Sampler
from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.runtime.denoise import LatentsObserver
from tests.cli.conftest import STEPS, Command

QUICK = ("--steps", STEPS, "--images", 3, "--batch", 2, "--rounds", 1)
CONTRACT = ["policy", "steps", "seconds", "speedup", "rho", "efficiency", "psnr_db", "ssim"]
SHOWN = [*CONTRACT, "gain_db", "baseline"]


def test_rows_of_json_and_csv_are_the_same(command: Command, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    page = tmp_path / "new" / "report.html"
    wanted = ("--json", "--csv", path, "--report", page)
    found = command("bench", bundle, "--policies", "fora, robust@2,fewer-steps@2", *QUICK, *wanted)
    assert found.code == 0, found.stderr
    rows = json.loads(found.stdout)
    assert [list(row) for row in rows] == [list(COLUMNS)] * len(rows)
    assert list(COLUMNS[: len(CONTRACT)]) == CONTRACT
    assert [row["policy"] for row in rows[:4]] == ["none", "fora", "robust@2", "fewer-steps@2"]
    assert [row["steps"] for row in rows[:4]] == [STEPS, STEPS, STEPS, STEPS // 2]
    none, fora, *_ = rows
    by_name = {row["policy"]: row for row in rows}
    assert fora["policy"] in by_name[fora["baseline"]]["pairs_with"].split(", ")
    assert fora["flops"] == pytest.approx((1 - fora["flops_saved"]) * none["flops"])
    assert 0 < fora["flops_saved"] < fora["rho"]  # embedding and head are launched at every step
    assert (none["psnr_db"], none["rho"], none["speedup"]) == (None, 0.0, 1.0)  # identical: an infinite PSNR is null
    assert none["ssim"] == pytest.approx(1)
    assert fora["rho"] > 0
    assert isinstance(fora["psnr_db"], float)
    shown = page.read_text(encoding="utf-8")
    assert shown.startswith("<!doctype html>")
    assert [row["policy"] for row in rows if f'data-policy="{row["policy"]}"' not in shown] == []
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert written == [{name: "" if cell is None else str(cell) for name, cell in row.items()} for row in rows]


def test_without_json_a_person_reads_a_table(command: Command, bundle: Path) -> None:
    shown = command("bench", bundle, "--policies", "none", *QUICK).stdout
    assert shown.split()[: len(SHOWN)] == SHOWN
    assert re.search(r"^ none +8 +\d+\.\d+ +1\.000 +0\.000 +\d\.\d+ +– +1\.000 +– +–$", shown, re.MULTILINE)


def test_an_interrupted_bench_goes_on_where_it_was_and_another_run_is_refused(
    command: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished is neither sampled nor timed again, and gives the same rows."""
    arguments = (bundle, "--policies", "fora", *QUICK, "--results", tmp_path / "kept", "--json")
    asked: list[str] = []

    def counted(
        pipeline: Pipeline, request: SampleRequest, policy: Policy, *, on_latents: LatentsObserver | None = None
    ) -> SampleResult:
        asked.append(policy.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample_with_policy(pipeline, request, policy, on_latents=on_latents)

    monkeypatch.setattr(bench_sampling, "sample_with_policy", counted)
    assert command("bench", *arguments).code == 130
    first = json.loads(command("bench", *arguments).stdout)
    assert asked[:4] == ["none", "none", "fora", "fora"]  # the uncached images were kept
    finished = len(asked)
    again = json.loads(command("bench", *arguments).stdout)
    assert len(asked) == finished
    changing = {"efficiency"}  # the blocks' share of the time is measured anew
    assert [{name: cell for name, cell in row.items() if name not in changing} for row in again] == [
        {name: cell for name, cell in row.items() if name not in changing} for row in first
    ]
    other = command("bench", *arguments, "--seed", 1)
    assert "holds the results of another run (seed 0, not 1). Choose another folder" in other.error


def test_on_a_terminal_the_list_is_what_has_room_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    show_policies(as_json=False)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in PRESETS)  # no name is broken
    assert max(len(line) for line in lines[:-2]) <= 100
    assert "--list --json" in lines[-1]


def test_list_shows_every_preset_without_a_bundle(command: Command) -> None:
    shown = command("bench", "--list").stdout
    rows = shown.partition("─\n")[2].partition("\n\n")[0].splitlines()
    assert len(rows) == len(PRESETS) + len(FILE_PRESETS)  # a row is a line
    assert [name for name in PRESETS if not re.search(rf"^ {name} ", shown, re.MULTILINE)] == []
    assert re.search(
        r"^ fora +step index +interval, interval 3, offset 0 +parts +gated .* no +interval +2407.01425$",
        shown,
        re.MULTILINE,
    )
    scheduled = PRESETS["scheduled"]
    assert re.search(rf"^ scheduled .* {scheduled.predictor.label} .* calibration ", shown, re.MULTILINE)
    assert re.search(r"^ teacache .* profile: output_change .* 2411.19108$", shown, re.MULTILINE)
    assert [name for name in FILE_PRESETS if not re.search(rf"^ {name}@FILE ", shown, re.MULTILINE)] == []
    described = json.loads(command("bench", "--list", "--json").stdout)
    papers = {preset["name"]: preset["paper"] for preset in described}
    assert (papers["none"], papers["fora"], papers["teacache"]) == ("", "2407.01425", "2411.19108")
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
        (["--results", "BUNDLE/results"], "lies in the bundle"),
        (["--policies", "fora", "--samples", "100"], "no network for their features"),
        (["--policies", "fora", "--samples", "5"], "samples is 5, allowed are 0"),
        (["--policies", "fora", "--features", "BUNDLE/manifest.json"], "feature network .* can't be opened"),
        (["--policies", "fora", "--reference-features", "real.safetensors"], "no network is given"),
        (["--csv", "rows.csv", "--report", "rows.csv"], "is also the output"),
        (["--report", "BUNDLE/report.html"], "lies in the bundle"),
        (["--csv", ""], "Invalid value for '--csv': it is empty"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_timed(
    command: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], message: str
) -> None:
    monkeypatch.setattr(Sampler, "sampled", None)  # calling it would be a TypeError
    given = [str(word).replace("BUNDLE", str(bundle)) for word in arguments]
    assert re.search(message, command("bench", bundle, *given).error)


def test_no_bundle_is_a_usage_error(command: Command) -> None:
    assert "Invalid value for BUNDLE: it is missing. Give a bundle's folder, or --list. See: " in command("bench").error
