"""The peers' caches attach to DiT and skip what they say; every row compares with its own side's uncached run."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
sys.path.append(str(BENCHMARKS))  # the scripts import their siblings by bare names

from diffusers import DiTTransformer2DModel  # noqa: E402
from peers import UNCACHED, diffusers_arms, measure, our_arms, requests  # noqa: E402

from adacorr_deploy.exporters import LoadedModel  # noqa: E402
from adacorr_deploy.exporters.dit_adapter import DiTModel  # noqa: E402
from adacorr_deploy.runtime import Pipeline  # noqa: E402
from tests.runtime.conftest import write_bundle  # noqa: E402
from tests.runtime.fake_backend import FakeBackend  # noqa: E402
from tests.runtime.tiny_dit import SCHEDULE, TinyDiT  # noqa: E402

STEPS, BLOCKS = 12, 3


def loaded_model() -> LoadedModel:
    """A random DiT that takes the tiny bundle's latents and labels."""
    torch.manual_seed(0)
    module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=BLOCKS,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=3,
    )
    return LoadedModel(
        name="tiny", model=DiTModel(module.eval()), schedule=SCHEDULE, checkpoint_sha256="0" * 64, class_names=None
    )


def test_every_hook_attaches_and_counts_what_it_evaluates(tmp_path: Path) -> None:
    args = argparse.Namespace(steps=STEPS, guidance=2.0, images=2, batch=1)
    model = TinyDiT()
    with Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend.of(model)) as pipeline:
        arms = [*diffusers_arms(pipeline, loaded_model(), args), *our_arms(pipeline, ["fora@2"])]
        rows = {row.arm: row for row in measure(arms, requests(pipeline, args), rounds=1)}
    for uncached in (UNCACHED, "none"):
        assert (rows[uncached].evaluated, rows[uncached].psnr_db, rows[uncached].speedup) == (1.0, None, 1.0)
    assert rows["fora@2"].evaluated == pytest.approx((STEPS / 2 + 2) / STEPS)  # with the second and the last step
    hooks = [row for name, row in rows.items() if name.startswith("diffusers ")]
    assert {row.arm.split()[1] for row in hooks} == {"FirstBlockCache", "MagCache", "TaylorSeer"}
    for row in hooks:
        assert 1 / BLOCKS / STEPS < row.evaluated <= 1
        assert row.psnr_db is not None
        assert math.isfinite(row.psnr_db) == (row.evaluated < 1)
    first, *_, last = [row for row in hooks if "TaylorSeer" in row.arm]
    assert 0.5 < first.evaluated < 0.75
    assert last.evaluated < first.evaluated


def test_requests_are_of_as_many_images_as_were_asked_for(tmp_path: Path) -> None:
    args = argparse.Namespace(steps=STEPS, guidance=2.0, images=5, batch=2)
    model = TinyDiT()
    with Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend.of(model)) as pipeline:
        assert [request.labels for request in requests(pipeline, args)] == [(0, 1), (2, 0), (1,)]
