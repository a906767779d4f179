"""A golden sample for the tiny DiT's bundle, which the runtime itself makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.core.bundle import open_bundle, store_in_bundle
from adacorr_deploy.core.golden import GOLDEN_FILE, GoldenSample
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy
from tests.runtime.fake_backend import FakeBackend

STEPS = 4
INITIAL = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 4)


def golden_sample(bundle: Path, backend: FakeBackend, *, tolerance: float = 1e-4) -> GoldenSample:
    """Return what a backend makes of one image with guidance."""
    request = SampleRequest((2,), steps=STEPS, guidance=1.5, latents=INITIAL[None])
    with Pipeline.open(bundle, backend=backend) as pipeline:
        final = sample_with_policy(pipeline, request, PRESETS["none"]).latents[0]
    return GoldenSample(label=2, steps=STEPS, guidance=1.5, tolerance=tolerance, initial=INITIAL, final=final)


def store_golden(bundle: Path, content: GoldenSample | str) -> Path:
    """Store a sample, or whatever stands for one, with its hash, and return where it is."""
    text = content if isinstance(content, str) else content.model_dump_json()
    return store_in_bundle(open_bundle(bundle), GOLDEN_FILE, text.encode())[1]
