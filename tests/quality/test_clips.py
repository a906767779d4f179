"""Clips are calibrated and compared as images are, over all their frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.quality import bench_sampling
from adacorr_deploy.quality.bench import bench
from adacorr_deploy.quality.bench_options import BenchOptions, requests
from adacorr_deploy.quality.calibrate import calibrate
from adacorr_deploy.quality.features import feature_source
from adacorr_deploy.quality.metrics import psnr_db, ssim_per_image
from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.runtime.denoise import LatentsObserver
from tests.quality.calibrating import PREDICTORS, STEPS, options
from tests.quality.test_calibrate import RTOL, skipping_error
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_clips import FRAMES, TinyClips

OPTIONS = BenchOptions(images=3, batch=2, rounds=1, steps=STEPS, guidance=3.0, seed=4)
FORA = policy_named("fora")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    model = TinyClips()
    path = write_bundle(tmp_path_factory.mktemp("bundles") / "clips", model)
    with Pipeline.open(path, backend=FakeBackend.of(model)) as opened:
        yield opened


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda predictor: predictor.label)
def test_skipping_the_last_steps_of_clips_costs_what_it_really_does(pipeline: Pipeline, predictor: Predictor) -> None:
    costs = calibrate(pipeline, options(predictor)).skip_costs[STEPS - 2][0]
    assert costs[0] > 1e-10  # far above the floor, or there would be nothing to compare
    expected = skipping_error(pipeline, predictor, first=STEPS - 2, count=2, gap=1)
    assert costs[1] == pytest.approx(max(expected, costs[0]), rel=RTOL)


def test_a_bench_compares_all_frames_and_shows_the_first(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def enlarged(
        opened: Pipeline, request: SampleRequest, policy: Policy, *, on_latents: LatentsObserver | None = None
    ) -> SampleResult:
        """SSIM's window takes frames of eleven pixels a side."""
        result = sample_with_policy(opened, request, policy, on_latents=on_latents)
        return replace(result, latents=np.kron(result.latents, np.ones((6, 6), np.float32)))

    monkeypatch.setattr(bench_sampling, "sample_with_policy", enlarged)
    measured = bench(pipeline, [FORA], OPTIONS, shown=True)
    mine, none = (
        np.concatenate([enlarged(pipeline, request, policy).latents for request in requests(pipeline, OPTIONS)])
        for policy in (FORA, PRESETS["none"])
    )
    row = next(row for row in measured.rows if row.policy == "fora")
    assert not row.error
    assert row.psnr_db == pytest.approx(psnr_db(mine, none))
    frames, uncached = (latents[:, 0].reshape(-1, 1, 12, 12) for latents in (mine, none))
    assert len(frames) == OPTIONS.images * FRAMES
    assert row.ssim == pytest.approx(ssim_per_image(frames, uncached).mean())
    assert 0 < row.ssim < 1 - 1e-9
    sampled = measured.runs["fora"].sampled
    assert sampled is not None and sampled.pictures is not None
    np.testing.assert_array_equal(sampled.pictures, mine[:, :, 0])


def test_features_are_not_taken_of_clips(pipeline: Pipeline, tmp_path: Path) -> None:
    assert feature_source(pipeline.manifest, None, None) is None
    with pytest.raises(RequestError, match="tiny makes clips, and features are of images"):
        feature_source(pipeline.manifest, tmp_path / "net.onnx", None)
