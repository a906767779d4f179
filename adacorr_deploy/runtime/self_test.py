"""The self-test: a bundle's golden sample, sampled again by its engines on the machine that they are to serve on."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from adacorr_deploy.caching.policy import PRESETS, IntervalGate, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.bundle import Bundle, verified_content
from adacorr_deploy.core.errors import BundleError, EngineError, RequestError
from adacorr_deploy.core.golden import GOLDEN_DIR, GoldenSample, largest_golden_bytes
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.untrusted import first_fault
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.request import SampleRequest, check_request
from adacorr_deploy.runtime.sampling import sample_with_policy

# Both evaluate every block of every step, so both must give the golden latents: one block after another, each launched
# from its second run on as a graph where the backend has such; and all blocks of a step at once, as policies over whole
# steps run them, which is a graph of its own.
_POLICIES: Final = (
    PRESETS["none"],
    Policy(
        name="none, whole steps",
        gate=IntervalGate(interval=1),
        predictor=Predictor(kind=PredictorKind.OUTPUT_TAYLOR),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTestResult:
    """What a passed self-test measured, and where.

    Attributes:
        error: Relative L2 of the final latents against the original PyTorch modules' in float32: the largest.
        tolerance: What is allowed.
        backend: Its name.
        hardware: See `Backend.hardware`.
        seconds: Of all runs.
    """

    error: float
    tolerance: float
    backend: str
    hardware: str
    seconds: float


def self_test(pipeline: Pipeline, progress: Progress | None = None) -> SelfTestResult:
    """Sample a bundle's golden sample and compare. All engines take part but those that only reuse launches.

    Args:
        pipeline: An open bundle.
        progress: Told before each run.

    Raises:
        BundleError: If the bundle has no golden sample, or it is not of its model.
        EngineError: If the latents differ by more than the bundle's tolerance, or an engine fails.
    """
    request, expected, tolerance = _golden(pipeline.bundle)
    name, hardware = pipeline.backend.name, pipeline.backend.hardware
    error, started = 0.0, time.perf_counter()
    for done, policy in enumerate(_POLICIES):
        if progress is not None:
            progress("self-test", done, len(_POLICIES))
        images = sample_with_policy(pipeline, request, policy).latents
        error = max(error, *(_relative_l2(image, expected) for image in images))
    if error > tolerance:
        raise EngineError(
            f"{pipeline.bundle.path} fails its self-test with {name} on {hardware}: the final latents differ from the "
            f"PyTorch model's by {error:.1e} (relative L2), allowed is {tolerance:g}. Rebuild the bundle for "
            "this machine with adacorr-build, or find the part that differs with adacorr-validate."
        )
    seconds = time.perf_counter() - started
    return SelfTestResult(error=error, tolerance=tolerance, backend=name, hardware=hardware, seconds=seconds)


def _golden(bundle: Bundle) -> tuple[SampleRequest, NDArray[np.float32], float]:
    """Return the request of a bundle's golden sample, the latents that every image of it ends at, and the tolerance."""
    manifest = bundle.manifest
    listed = [name for name in manifest.files if name.startswith(f"{GOLDEN_DIR}/")]
    if len(listed) != 1:
        raise BundleError(
            f"{bundle.path} holds {len(listed)} golden samples, and a self-test needs one; earlier releases made none. "
            "Rebuild the bundle with adacorr-build, or compare it with its PyTorch model: adacorr-validate"
        )
    (name,) = listed
    try:
        limit = largest_golden_bytes(manifest.model)
        content = verified_content(bundle.file(name), manifest.files[name].sha256, limit_bytes=limit)
        sample = GoldenSample.model_validate_json(content)
        return _request(sample, manifest), sample.final.reshape(manifest.model.latent_shape), sample.tolerance
    except (ValueError, RequestError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else str(error).rstrip(".")
        raise BundleError(f"{bundle.file(name)}: {fault}. Rebuild the bundle with adacorr-build.") from error


def _request(sample: GoldenSample, manifest: Manifest) -> SampleRequest:
    """Return a request of as many equal images as the bundle's engines take at least.

    Raises:
        ValueError: If the latents are not of the model's shape.
        RequestError: If the model can't serve the request.
    """
    build, shape = manifest.engine_build, manifest.model.latent_shape
    batch = build.profile.batch[0] if build is not None else 1
    request = SampleRequest(
        labels=(sample.label,) * batch if sample.label is not None else (),
        steps=sample.steps,
        sampler=sample.sampler,
        guidance=sample.guidance,
        latents=np.stack([sample.initial.reshape(shape)] * batch),
    )
    request = example_request(manifest.model, request, (0,) * batch)
    check_request(request, manifest.model, manifest.schedule)
    return request


def _relative_l2(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / scale if scale else math.inf
