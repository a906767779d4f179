"""Invariant: a calibration is stored with its hash, and measuring again gives the same bytes."""

from __future__ import annotations

import json
import re
import shlex
from inspect import signature
from pathlib import Path

import pytest

from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, policy_from_file
from adacorr_deploy.cli.calibrate import calibrate
from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.quality.calibrate import CalibrationOptions
from tests.cli.conftest import STEPS, Command
from tests.cli.full_disk import small_files_only


def calibrations(bundle: Path) -> dict[str, bytes]:
    """The stored calibrations, by name; opening the bundle checks their hashes."""
    opened = open_bundle(bundle)
    return {name: opened.file(name).read_bytes() for name in opened.manifest.files if name.startswith("calibration/")}


def test_json_says_where_the_calibration_is(command: Command, own_bundle: Path) -> None:
    before = calibrations(own_bundle)
    found = command("calibrate", own_bundle, "--steps", 6, "--guidance", 1.5, "--images", 1, "--json").json
    assert list(found) == ["calibration", "steps", "guidance", "seconds"]
    assert (found["steps"], found["guidance"]) == (6, 1.5)
    after = calibrations(own_bundle)
    (new,) = after.keys() - before.keys()
    assert found["calibration"] == str(own_bundle / new)
    assert {**after, **before} == after


def test_defaults_are_those_of_the_layer_below() -> None:
    defaults = {name: parameter.default for name, parameter in signature(calibrate).parameters.items()}
    options = CalibrationOptions()
    assert (defaults["predictor"], defaults["order"]) == (None, None)  # so that it shows whether they were given
    assert options.predictor == PRESETS[DEFAULT_POLICY].predictor
    assert (options.sampler, options.steps, options.guidance, options.images) == (
        defaults["sampler"],
        defaults["steps"],
        defaults["guidance"],
        defaults["images"],
    )


@pytest.mark.parametrize("given", [("--predictor", "hold"), ("--order", 2), ("--revision", "none")])
@pytest.mark.parametrize("wanted", [("--policies", "fora"), ("--target-speedup", 2)])
def test_a_predictor_that_would_not_be_used_is_refused(
    command: Command, own_bundle: Path, given: tuple[str, object], wanted: tuple[str, object]
) -> None:
    error = command("calibrate", own_bundle, *wanted, *given).error
    assert "Leave --predictor, --order and --revision out" in error


def test_measuring_again_gives_the_same_bytes(command: Command, own_bundle: Path) -> None:
    before = calibrations(own_bundle)
    shown = command("calibrate", own_bundle, "--steps", STEPS, "--images", 2).stdout
    assert f": ddim, {STEPS} steps, guidance 4, in " in shown
    assert calibrations(own_bundle) == before
    command("calibrate", own_bundle, "--steps", STEPS, "--images", 1)
    assert len(calibrations(own_bundle)) == len(before)  # replaced
    assert calibrations(own_bundle) != before


def test_the_predictor_asked_for_is_the_one_measured(command: Command, own_bundle: Path) -> None:
    found = command(
        "calibrate", own_bundle, "--steps", 6, "--images", 1, "--predictor", "taylor", "--order", 2, "--json"
    )
    stored = json.loads(Path(str(found.json["calibration"])).read_text())
    assert stored["predictor"] == {"kind": "taylor", "order": 2, "revision": "none"}
    found = command("calibrate", own_bundle, "--steps", 6, "--images", 1, "--revision", "linear", "--json")
    stored = json.loads(Path(str(found.json["calibration"])).read_text())
    assert stored["predictor"] == {"kind": "output-taylor", "order": 1, "revision": "linear"}


@pytest.mark.parametrize("policy", ["robust@2", "fora+adacorrection@2", "fbcache+adacorrection@2"])
def test_the_command_that_a_refused_policy_is_told_makes_its_calibration(
    command: Command, own_bundle: Path, tmp_path: Path, policy: str
) -> None:
    """In a bundle whose calibration for these runs is without revision, as all were before there was any."""
    before = ("--steps", 6, "--images", 1, "--predictor", "output-taylor")
    assert command("calibrate", own_bundle, *before).code == 0
    run = ("run", own_bundle, "-o", tmp_path / "out", "--steps", 6, "--policy", policy)
    error = command(*run).error
    assert "the bundle's are for predictor output-taylor-1, not " in error
    name, *words = shlex.split(error.partition("Make one with: ")[2].partition(", or choose")[0])
    assert command(name.removeprefix("adacorr-"), *words, "--images", 1).code == 0
    assert command(*run).code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps is 0, allowed"),
        (["--steps", "3"], "fewer than 4 there is nothing to skip"),
        (["--guidance", "0.5"], "guidance is 0.5, allowed is at least 1"),
        (["--sampler", "ddpm"], "adds noise at every step"),
        (["--images", "0"], "Invalid value for '--images'"),
        (["--images", "1000000000"], "Invalid value for '--images': .* 1024"),
        (["--order", "3"], "Invalid value for '--order'"),
        (["--predictor", "oracle"], "'oracle' is not one of 'hold', 'taylor', 'gated', "),
    ],
)
def test_bad_options_are_one_line_and_change_nothing(
    command: Command, bundle: Path, arguments: list[str], message: str
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert re.search(message, command("calibrate", bundle, *arguments).error)
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_failed_write_keeps_the_earlier_calibration(command: Command, own_bundle: Path) -> None:
    before = calibrations(own_bundle)
    with small_files_only(1000):
        error = command("calibrate", own_bundle, "--steps", STEPS, "--images", 1).error
    assert re.search("own.bundle.* can't be written: .*File too large", error)
    assert calibrations(own_bundle) == before


def test_an_interrupted_calibration_is_taken_up_and_leaves_nothing_behind(
    command: Command, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise EngineError("the machine was switched off")

    with monkeypatch.context() as patch:
        patch.setattr("adacorr_deploy.quality.calibration_study.CalibrationStudy.calibration", fail)
        assert "switched off" in command("calibrate", own_bundle, "--steps", 6, "--images", 1).error
    (unfinished,) = (own_bundle / "calibration").glob(".unfinished-*")
    assert {file.name for file in unfinished.iterdir()} == {"identity.json", "trajectory.npz", "measured.npz"}
    open_bundle(own_bundle)  # what is unfinished is no part of it
    recorded: list[str] = []
    monkeypatch.setattr(
        "adacorr_deploy.quality.replay.Replay.evaluated_run", lambda *arguments: recorded.append("measured again")
    )
    assert command("calibrate", own_bundle, "--steps", 6, "--images", 1).code == 0
    assert recorded == []
    assert list((own_bundle / "calibration").glob(".unfinished-*")) == []


def test_what_policies_look_up_is_measured_by_their_names(command: Command, own_bundle: Path) -> None:
    run = ("--steps", 6, "--images", 1)
    found = command("calibrate", own_bundle, *run, "--policies", "teacache, fbcache+adacorrection", "--json").json
    files = found["files"]
    assert isinstance(files, list)
    assert [Path(file).parent.name for file in files] == ["profile", "calibration"]
    assert open_bundle(own_bundle).manifest.files.keys() >= {str(Path(file).relative_to(own_bundle)) for file in files}
    assert "policy 'nonsense' is neither a preset" in command("calibrate", own_bundle, "--policies", "nonsense").error
    assert "nothing to measure" in command("calibrate", own_bundle, "--policies", "fora").error
    assert "--policies is empty" in command("calibrate", own_bundle, "--policies", ",").error


def test_a_search_writes_the_policy_file_and_the_front(command: Command, own_bundle: Path, tmp_path: Path) -> None:
    policy, front = tmp_path / "policy.json", tmp_path / "front.json"
    run = ("--steps", STEPS, "--images", 2, "--policies", "fora,robust,scheduled")
    search = ("--target-speedup", 1.4, "-o", policy, "--front", front)
    found = command("calibrate", own_bundle, *run, *search, "--json").json
    assert found == json.loads(front.read_text())
    chosen = policy_from_file(policy)
    assert chosen.name == found["chosen"]
    rows = found["rows"]
    assert isinstance(rows, list)
    assert {row["policy"].partition("@")[0] for row in rows} <= {"fora", "robust", "scheduled"}
    assert [row["policy"] for row in rows if row["front"] == "yes"].count(chosen.name) == 1
    sampled = command(
        "run", own_bundle, "--class-labels", 0, "--steps", STEPS, "--policy", policy, "-o", tmp_path / "x"
    )
    assert sampled.code == 0, sampled.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-speedup", 2, "--target-psnr", 30], "are two targets. Give one of them"),
        (["-o", "policy.json"], "-o and --front are what a search writes"),
        (["--target-speedup", 0.5], "target speed-up is 0.5, allowed is more than 1 and at most 20"),
        (["--target-psnr", 500], "target PSNR is 500, allowed"),
        (["--target-speedup", 2, "--policies", "none"], "policy none has no knob to tune"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(
    command: Command, bundle: Path, arguments: list[object], message: str
) -> None:
    assert message in command("calibrate", bundle, "--steps", STEPS, *arguments).error
