"""Real engines, ONNX Runtime's on the CPU: rows compute alike in every bucket, and requests as they do alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime import BatchingEngine, Pipeline, SampleRequest, sample_with_policy
from tests.exporters.conftest import loaded, random_dit
from tests.runtime.batching_world import Box

pytestmark = pytest.mark.slow  # a bundle is exported

POLICIES = ("none", "fora@2", "paper-exact", "fewer-steps")


@pytest.fixture(scope="module")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random blocks over 256 tokens: attention sums over more of them than a kernel takes at once."""
    model = random_dit(
        attention_head_dim=24,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=32,
        num_embeds_ada_norm=5,
    )
    output = tmp_path_factory.mktemp("real") / "bundle"
    options = BuildOptions(precision=DType.FLOAT32)
    return build_bundle(loaded(model), output, OnnxRuntimeBackend(threads=1), options).path


@pytest.mark.parametrize(("threads", "lanes"), [(1, 2), (2, 1), (5, 1)])
def test_requests_compute_with_real_engines_what_they_compute_alone(
    real_bundle: Path, threads: int, lanes: int
) -> None:
    requests = [
        (SampleRequest((seed % 5,), steps=2 + seed % 3, guidance=1.0 + seed % 2 * 2, seed=seed), policy)
        for seed, policy in enumerate(map(policy_named, POLICIES * 2))
    ]
    requests.append((replace(requests[0][0], labels=(1, 2, 3), sampler=Sampler.DDPM), policy_named("none")))
    with Pipeline.open(real_bundle, backend=OnnxRuntimeBackend(threads=threads)) as pipeline:
        alone = [sample_with_policy(pipeline, request, policy).latents for request, policy in requests]
        with BatchingEngine(pipeline, buckets=(1, 2, 3, 5, 8), lanes=lanes) as engine:
            assert (engine.buckets.sizes, engine.buckets.identical) == ((1, 2, 3, 5, 8), True)
            boxes = [Box() for _ in requests]
            for (request, policy), box in zip(requests, boxes, strict=True):
                engine.submit(request, policy, on_done=box.put)
            results = [box.get().result for box in boxes]
    for result, latents in zip(results, alone, strict=True):
        assert result is not None
        np.testing.assert_array_equal(result.latents, latents)
