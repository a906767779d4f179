"""A report of a real bench of the tiny model, with all that can be on it: a hostile name, a failure, sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import PRESETS, IntervalGate, Policy, policy_named
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.quality import bench as bench_module
from adacorr_deploy.quality import bench_sampling
from adacorr_deploy.quality.bench import Bench, bench
from adacorr_deploy.quality.bench_options import BenchOptions
from adacorr_deploy.quality.features import FeatureSource, RealFeatures
from adacorr_deploy.quality.metrics import feature_statistics
from adacorr_deploy.quality.report import ReportFacts, report_html
from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.runtime.denoise import LatentsObserver
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&"
FAILURE = "block_02 failed: <b>out of memory</b>"
OPTIONS = BenchOptions(images=5, batch=2, rounds=1, steps=12, guidance=3.0, samples=40)
FACTS = ReportFacts(
    model="tiny & <small>",
    sampler="DDIM",
    checkpoint="0123456789abcdef" * 4,
    machine={"processor": "<i>imagined</i>", "cores": "2"},
    network="random pixels",
    real="nothing real",
    made=datetime(2026, 11, 27, 12, 0, tzinfo=timezone.utc),
)


@dataclass(frozen=True, slots=True)
class RandomProjection:
    """A feature network: pixels times a fixed random matrix."""

    width: int = 3

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        flat = images.reshape(len(images), -1)
        return flat @ np.random.default_rng(0).normal(size=(flat.shape[1], self.width)).astype(np.float32)


def feature_source() -> FeatureSource:
    features = np.random.default_rng(1).normal(size=(60, 3))
    real = RealFeatures(statistics=feature_statistics(features), features=features, name="nothing real")
    return FeatureSource(network=RandomProjection(), name="random pixels", identity="random", real=real)


@pytest.fixture(scope="package")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", TinyDiT())
    with Pipeline.open(Path(bundle), backend=FakeBackend.of(TinyDiT())) as opened:
        yield opened


@pytest.fixture(scope="package")
def measured(pipeline: Pipeline) -> Bench:
    """A bench whose times are made up, so that its rows are the same on every machine, and whose one policy fails."""

    def timed(opened: Pipeline, policy: Policy, options: BenchOptions) -> float:
        share = policy.sampled_steps(options.steps) / options.steps
        return {"fora": 0.4, "fora@2": 0.55, HOSTILE: 0.7}.get(policy.name, share)

    def failing(
        opened: Pipeline, request: SampleRequest, policy: Policy, *, on_latents: LatentsObserver | None = None
    ) -> SampleResult:
        if policy.name == "fora@5":
            raise EngineError(FAILURE)
        return sample_with_policy(opened, request, policy, on_latents=on_latents)

    policies = [
        *(policy_named(name) for name in ("fora", "fora@2", "fora@5", "paper-exact")),
        PRESETS["fora"].model_copy(update={"name": HOSTILE, "gate": IntervalGate(interval=4)}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_module, "_seconds_for_all", timed)
        patch.setattr(bench_sampling, "sample_with_policy", failing)
        return bench(pipeline, policies, OPTIONS, source=feature_source(), shown=True)


@pytest.fixture(scope="package")
def page(measured: Bench) -> str:
    return report_html(measured, FACTS)
