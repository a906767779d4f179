"""Invariant: 0 says that the bundle is its model, 1 that it differs, 2 that they could not be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from adacorr_deploy.core.specs import DType
from adacorr_deploy.quality import validate as quality
from tests.cli.conftest import STEPS, Command, write_model

QUICK = ("--steps", STEPS, "--images", 1)


def test_json_holds_every_part_and_the_verdict(command: Command, bundle: Path, model: Path) -> None:
    found = command("validate", bundle, "--reference", model, *QUICK, "--policy", "robust@2", "--json").json
    assert list(found) == ["parts", "trajectory", "passed"]
    assert found["passed"] is True
    parts, trajectory = found["parts"], found["trajectory"]
    assert isinstance(parts, dict)
    assert isinstance(trajectory, dict)
    assert {"embed", "condition", "block_00", "block_01", "block_02", "head", "signals"} <= parts.keys()
    assert all(set(errors) == {"max_abs", "rel_l2"} for errors in parts.values())
    assert trajectory["policy"] == "robust@2"
    assert trajectory["policy_psnr_db"] > 0


def test_a_bundle_that_differs_exits_with_1_and_says_where(
    command: Command, bundle: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_passes = quality.Tolerances(part=-1.0, trajectory=-1.0, trajectory_max_abs=-1.0)
    monkeypatch.setattr(quality, "TOLERANCES", {DType.FLOAT32: nothing_passes})
    found = command("validate", bundle, "--reference", model, *QUICK)
    assert found.code == 1
    assert "NOT passed: embed, " in found.stdout
    assert found.stderr == ""


def test_without_json_a_person_reads_a_table_and_a_verdict(command: Command, bundle: Path, model: Path) -> None:
    found = command("validate", bundle, "--reference", model, *QUICK)
    assert found.code == 0
    assert " block_02 " in found.stdout
    assert "policy none" in found.stdout
    assert "identical to the uncached run" in found.stdout
    assert found.stdout.splitlines()[-1] == "passed"


def test_another_checkpoint_can_not_be_compared(command: Command, bundle: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    assert "checkpoint" in command("validate", bundle, "--reference", other, *QUICK).error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "nowhere"], "nowhere doesn't exist"),
        (["--reference", "MODEL", "--steps", "0"], "steps is 0, allowed"),
        (["--reference", "MODEL", "--images", "1025"], "Invalid value for '--images': Input should be less than"),
        (["--reference", ""], "MODEL is empty. Give demo, or a path."),
        (["--reference", "MODEL", "--policy", "nix"], "policy 'nix' is neither a preset"),
        ([], "Missing option '--reference'"),
    ],
)
def test_bad_options_are_one_line(
    command: Command, bundle: Path, model: Path, arguments: list[str], message: str
) -> None:
    given = [str(model) if word == "MODEL" else word for word in arguments]
    assert message in command("validate", bundle, *given).error
