"""A small random model, its bundle, and commands run in this process: what every test of this folder shares."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from adacorr_deploy.cli import bench, build, calibrate, run, serve, validate
from adacorr_deploy.core.manifest import MANIFEST_NAME

CLASS_NAMES = ("T-shirt/top", "Trouser", "Bag, small")
STEPS = 8  # that the bundle is calibrated for
SIDE = 12

MAINS: dict[str, Callable[[list[str]], NoReturn]] = {
    "build": build.main,
    "run": run.main,
    "validate": validate.main,
    "calibrate": calibrate.main,
    "bench": bench.main,
    "serve": serve.main,
}


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, object]:
        assert self.code == 0, self.stderr
        document: dict[str, object] = json.loads(self.stdout)
        return document

    @property
    def error(self) -> str:
        """The one line that a failed command says."""
        assert self.code == 2, (self.code, self.stdout, self.stderr)
        assert self.stdout == ""
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("error: ")
        return lines[0]


Command = Callable[..., Outcome]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `adacorr-NAME` with arguments in this process."""

    def run_command(name: str, *arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            MAINS[name]([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return run_command


def write_model(folder: Path, *, channels: int = 1, seed: int = 0) -> Path:
    """Save a diffusers pipeline folder with a random DiT whose every weight matters."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        sample_size=SIDE,
        patch_size=4,
        num_embeds_ada_norm=len(CLASS_NAMES),
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(folder / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(label): name for label, name in enumerate(CLASS_NAMES)},
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run_main(name: str, *arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        MAINS[name]([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def shown_command(line: str) -> list[str]:
    """Return the command that stands after a line's first colon, as a shell would split it, without its adacorr-."""
    name, *words = shlex.split(line.partition(": ")[2])
    return [name.removeprefix("adacorr-"), *words]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the commands themselves, and calibrated for `STEPS` steps; not to be changed."""
    path = tmp_path_factory.mktemp("bundles") / "tiny.bundle"
    assert run_main("build", model, "-o", path) == 0
    assert run_main("calibrate", path, "--steps", STEPS, "--images", 2) == 0
    return path


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "own.bundle"))


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def edit_manifest(bundle: Path, **changes: object) -> None:
    edit_json(bundle / MANIFEST_NAME, **changes)
