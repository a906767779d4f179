"""Packaging the demo: converted weights compute what the trained module does, and what is shipped is complete."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

from adacorr_deploy.quality.metrics import BootstrapInterval

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "adacorr_deploy" / "demo"
torch = pytest.importorskip("torch")

if TYPE_CHECKING:
    from torch import Tensor


@pytest.fixture(scope="module")
def package_demo() -> Iterator[ModuleType]:
    """The script imports its siblings by bare names, as a script does."""
    sys.path.insert(0, str(ROOT / "tools" / "demo"))
    try:
        import package_demo

        yield package_demo
    finally:
        sys.path.remove(str(ROOT / "tools" / "demo"))


def random_state(package_demo: ModuleType) -> dict[str, Tensor]:
    """A model of the demo's shapes whose blocks all do something: adaLN-zero would hide every mistake."""
    torch.manual_seed(0)
    state = package_demo.DiT(**package_demo.CONFIG).state_dict()
    return {
        name: value if name == "pos_embed" else value + 0.03 * torch.randn_like(value) for name, value in state.items()
    }


def test_converted_weights_compute_what_the_trained_module_does(package_demo: ModuleType) -> None:
    state = random_state(package_demo)
    model = package_demo.transformer_from_training(state, "test")
    assert package_demo.largest_disagreement(model, state) < package_demo.AGREEMENT


def test_the_agreement_check_sees_the_other_timestep_embedding(package_demo: ModuleType) -> None:
    state = random_state(package_demo)
    model = package_demo.transformer_from_training(state, "test")
    package_demo.set_frequency_shift(model, 0)
    assert package_demo.largest_disagreement(model, state) > package_demo.AGREEMENT


def test_an_image_does_not_depend_on_how_many_are_drawn(package_demo: ModuleType) -> None:
    few, many = package_demo.initial_latents(2, seed=5), package_demo.initial_latents(4, seed=5)
    assert torch.equal(few, many[:2])
    assert not torch.equal(few[0], few[1])
    assert not torch.equal(few, package_demo.initial_latents(2, seed=6))


def test_the_card_says_what_was_run(package_demo: ModuleType) -> None:
    training = package_demo.Training(steps=100, batch=128, minutes=7, loss=0.0456, parameters=3_600_000)
    interval = BootstrapInterval(value=3.25, low=3.0, high=3.5)
    row = package_demo.DistanceRow(guidance=1.5, images=1000, interval=interval, recognised=0.875)
    card = package_demo.card_text(training, [row])
    for fact in (
        "100 steps of 128",
        "--images 12800",
        "0.0456",
        "3.6 M",
        "| 1.5 | 1000 | 3.25 (3.00 … 3.50) | 87.5 % |",
    ):
        assert fact in card
    assert "Fréchet" not in package_demo.card_text(training, [])


def test_the_shipped_model_loads_and_guidance_depends_on_the_label(package_demo: ModuleType) -> None:
    model = package_demo.DiTTransformer2DModel.from_pretrained(SHIPPED / "transformer", local_files_only=True).eval()
    latents = package_demo.initial_latents(1, seed=0).expand(3, -1, -1, -1)
    with torch.inference_mode():
        output = model(latents, torch.full((3,), 500), torch.tensor([0, 7, package_demo.NULL_LABEL])).sample
    assert output.shape == (3, 1, 28, 28)
    noise_left = (output - latents).square().mean(dim=(1, 2, 3))
    assert (noise_left < 0.5).all(), "a trained model finds most of the noise"
    assert min((output[a] - output[b]).abs().max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_the_shipped_folder_is_whole_and_small(package_demo: ModuleType) -> None:
    index = json.loads((SHIPPED / "model_index.json").read_text(encoding="utf-8"))
    assert list(index["id2label"].values()) == list(package_demo.CLASS_NAMES)
    assert json.loads((SHIPPED / "labels.json").read_text(encoding="utf-8")) == list(package_demo.CLASS_NAMES)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 40 * 1024 * 1024
    for name in ("README.md", "CLASSIFIER.md", "samples.png", "loss.png", "loss.csv"):
        assert (SHIPPED / name).stat().st_size > 100, name


def test_the_shipped_scheduler_is_ddim_as_the_runtime_reads_it(package_demo: ModuleType) -> None:
    from adacorr_deploy.core.samplers import Sampler, sampler_table
    from adacorr_deploy.core.scheduler_config import schedule_from_config

    config = json.loads((SHIPPED / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    table = sampler_table(schedule_from_config(config), Sampler.DDIM, 50)
    scheduler = package_demo.demo_scheduler()
    scheduler.set_timesteps(50)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
