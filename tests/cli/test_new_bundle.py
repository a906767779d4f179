"""Invariant: what a build shows as the next step runs as it stands, whatever the model and its engines take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import LCMScheduler

from adacorr_deploy.cli.new_bundle import next_steps
from adacorr_deploy.core.bundle import open_bundle
from adacorr_deploy.core.engine_build import EngineBuild, Profile, WeightLayout
from tests.cli.conftest import Command, shown_command, write_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, whose name a shell would split."""
    path = tmp_path / "my models"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def compiled_for(bundle: Path, profile: Profile, *, calibrated: bool) -> list[str]:
    """Return the next steps of a bundle as if its engines had been compiled for these sizes."""
    opened = open_bundle(bundle)
    build = EngineBuild(version="1.7", targets=(), weights=WeightLayout.BAKED, profile=profile)
    changed = replace(opened, manifest=opened.manifest.model_copy(update={"engine_build": build}))
    return next_steps(changed, calibrated=calibrated)


# --- What models take --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_a_model_of_classes_it_runs_before_and_after_the_calibration_that_it_needs(
    command: Command, model: Path, folder: Path
) -> None:
    calibrate, meanwhile = command("build", model, "-o", folder / "new.bundle").stdout.splitlines()[-2:]
    assert calibrate == f"Policy robust needs a calibration first: adacorr-calibrate '{folder}/new.bundle'"
    assert meanwhile == (f"Sample without reuse meanwhile: adacorr-run '{folder}/new.bundle' --policy none -o images")
    assert command(*shown_command(meanwhile)).code == 0
    assert command(*shown_command(calibrate)).code == 0
    (line,) = next_steps(open_bundle(folder / "new.bundle"), calibrated=True)
    assert line == f"Sample from it with: adacorr-run '{folder}/new.bundle' -o images"
    assert " robust " in command(*shown_command(line)).stdout


def test_of_a_model_of_latents_it_keeps_them(command: Command, tmp_path: Path, folder: Path) -> None:
    latent = write_model(tmp_path / "latent", channels=4)
    line = command("build", latent, "-o", folder / "new.bundle", "--policy", "fora").stdout.splitlines()[-1]
    assert line.endswith(" --save-latents latents.npy")
    assert command(*shown_command(line)).code == 0


@pytest.mark.slow
def test_of_a_distilled_model_it_names_the_sampler_that_was_calibrated(
    command: Command, own_model: Path, folder: Path
) -> None:
    """The model's own, lcm, adds noise, under which a calibrated policy is refused."""
    LCMScheduler(clip_sample=False).save_pretrained(own_model / "scheduler")
    line = command("build", own_model, "-o", folder / "new.bundle", "--calibrate").stdout.splitlines()[-1]
    assert "--sampler ddim -o images" in line
    assert " robust " in command(*shown_command(line)).stdout
    LCMScheduler(clip_sample=False, original_inference_steps=20).save_pretrained(own_model / "scheduler")
    options = ("--policy", "fora", "--overwrite")
    line = command("build", own_model, "-o", folder / "new.bundle", *options).stdout.splitlines()[-1]
    assert line.endswith("--steps 20 -o images")
    assert command(*shown_command(line)).code == 0


# --- What engines take -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "labels"),
    [((1, 8, 16), ""), ((1, 2, 2), "--class-labels 0,1 "), ((4, 4, 6), "--class-labels 0,0,1,2 ")],
)
def test_engines_of_other_batches_are_given_as_many_labels(
    batch: tuple[int, int, int], labels: str, bundle: Path
) -> None:
    (line,) = compiled_for(bundle, Profile(batch=batch), calibrated=True)
    assert line == f"Sample from it with: adacorr-run {bundle} {labels}-o images"


def test_engines_of_fewer_steps_need_a_calibration_for_these(bundle: Path) -> None:
    """However a build calibrated: it did so for 50."""
    profile = Profile(batch=(1, 4, 8), steps=(1, 20, 20))
    for calibrated in (False, True):
        assert compiled_for(bundle, profile, calibrated=calibrated) == [
            f"Policy robust needs a calibration first: adacorr-calibrate {bundle} --steps 20 --images 8",
            f"Sample without reuse meanwhile: adacorr-run {bundle} --steps 20 --policy none -o images",
        ]
