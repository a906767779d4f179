"""A study of distances compares sets of the same seeds, goes on where it was, and says which run is nearer."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.progress import Progress

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))  # scripts import their siblings

from distances import UNCACHED, Run, Study, main, stages

from adacorr_deploy.core.errors import PolicyError, RequestError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.quality.bench_options import BenchOptions
from adacorr_deploy.quality.features import FeatureSource
from adacorr_deploy.quality.metrics import feature_statistics
from adacorr_deploy.runtime import Pipeline
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT

OPTIONS = BenchOptions(batch=8, steps=6, guidance=3.0, seed=4)
NAMES = (UNCACHED, "fora@2", "fora@5", "dpmpp-2m/4")


class Corners:
    """A network whose features are the first three pixels of an image."""

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return images.reshape(len(images), -1)[:, :3]


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend.of(TinyDiT())


@pytest.fixture
def pipeline(tmp_path: Path, backend: FakeBackend) -> Iterator[Pipeline]:
    with Pipeline.open(write_bundle(tmp_path / "tiny", TinyDiT()), backend=backend) as opened:
        yield opened


def studied(pipeline: Pipeline, folder: Path, *, samples: int) -> Study:
    study = Study(pipeline, FeatureSource(network=Corners(), name="corners", identity="corners", real=None), folder)
    study.advance([Run.named(name, OPTIONS) for name in NAMES], samples, Progress(disable=True))
    return study


def test_distances_and_ratios_are_of_pairs(pipeline: Pipeline, tmp_path: Path) -> None:
    study = studied(pipeline, tmp_path / "found", samples=40)
    real = feature_statistics(np.random.default_rng(0).normal(size=(200, 3)))
    uncached, near, far = (study.distances(name, real) for name in NAMES[:3])
    assert uncached.keys() == {"frechet"}
    assert 0 < near["frechet_uncached"].value < far["frechet_uncached"].value
    assert near["frechet_ratio"].value == pytest.approx(near["frechet"].value / uncached["frechet"].value)
    ratios = study.ratios("fora@2", "fora@5", real)
    assert ratios["frechet"].value == pytest.approx(near["frechet"].value / far["frechet"].value)
    expected = near["frechet_uncached"].value / far["frechet_uncached"].value
    assert ratios["frechet_uncached"].value == pytest.approx(expected)
    assert ratios["frechet"].low <= ratios["frechet"].value <= ratios["frechet"].high
    same = study.ratios("fora@2", "fora@2", real)["frechet"]
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_a_longer_study_samples_only_what_is_missing(pipeline: Pipeline, backend: FakeBackend, tmp_path: Path) -> None:
    studied(pipeline, tmp_path / "found", samples=16)
    before = len(backend.order)
    studied(pipeline, tmp_path / "found", samples=16)
    assert len(backend.order) == before
    studied(pipeline, tmp_path / "found", samples=24)
    assert before < len(backend.order) <= before * 3 / 2


def test_all_runs_stand_level_at_every_stage() -> None:
    assert list(stages(500, 200)) == [200, 400, 500]
    assert list(stages(200, 200)) == [200]
    assert all(early < late for early, late in itertools.pairwise(stages(1000, 300)))


def test_a_sampler_and_its_steps_make_an_uncached_run() -> None:
    run = Run.named("dpmpp-2m/22", OPTIONS)
    assert (run.policy.name, run.options.sampler, run.options.steps) == (UNCACHED, Sampler.DPMPP_2M, 22)
    assert Run.named("fora@2", OPTIONS).options == OPTIONS
    with pytest.raises(RequestError, match="'fast' is no number of steps"):
        Run.named("ddim/fast", OPTIONS)
    with pytest.raises(PolicyError, match="neither a preset"):
        Run.named("euler/20", OPTIONS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--pairs", "fora@2"), "'fora@2' is no pair. Write A=B"),
        (("--advance", "0"), "--advance is 0, allowed are whole numbers from 1"),
    ],
)
def test_what_is_no_study_is_told_before_anything_is_sampled(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[str, str],
    message: str,
) -> None:
    arguments = ["distances.py", str(tmp_path / "none.bundle"), "-o", str(tmp_path / "out"), *given]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
