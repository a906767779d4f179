"""The self-test: a bundle's golden samples, sampled again by its engines on the machine that they are to serve on."""

from __future__ import annotations

import itertools
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
from adacorr_deploy.core.golden import GOLDEN_DIR, GoldenSample, GoldenSamples, largest_golden_bytes
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.untrusted import first_fault
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.request import SampleRequest, check_request
from adacorr_deploy.runtime.sampling import sample_with_policy

# Both evaluate every block of every step, and must give the golden latents: one block after another, each launched from
# its second run on as a graph where the backend has such; and all blocks of a step at once, as policies over whole
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    request: SampleRequest
    expected: NDArray[np.float32]  # (C, H, W), of every image


def self_test(pipeline: Pipeline, progress: Progress | None = None) -> SelfTestResult:
    """Sample a bundle's golden samples and compare. Every part but the ones that only policies launch takes part.

    Args:
        pipeline: An open bundle.
        progress: Told before each run.

    Raises:
        BundleError: If the bundle has no golden samples, or they are not of its model.
        EngineError: If the latents differ by more than the bundle's tolerance, or an engine fails.
    """
    golden, cases = _golden(pipeline.bundle)
    name, hardware = pipeline.backend.name, pipeline.backend.hardware
    error, runs, started = 0.0, len(cases) * len(_POLICIES), time.perf_counter()
    for done, (case, policy) in enumerate(itertools.product(cases, _POLICIES)):
        if progress is not None:
            progress("self-test", done, runs)
        latents = sample_with_policy(pipeline, case.request, policy).latents
        error = max(error, *(_relative_l2(image, case.expected) for image in latents))
    if error > golden.tolerance:
        raise EngineError(
            f"{pipeline.bundle.path} fails its self-test with {name} on {hardware}: the final latents differ from the "
            f"PyTorch model's by {error:.1e} (relative L2), allowed is {golden.tolerance:g}. Rebuild the bundle for "
            "this machine with adacorr-build, or find the part that differs with adacorr-validate."
        )
    seconds = time.perf_counter() - started
    return SelfTestResult(error=error, tolerance=golden.tolerance, backend=name, hardware=hardware, seconds=seconds)


def _golden(bundle: Bundle) -> tuple[GoldenSamples, list[_Case]]:
    names = [name for name in bundle.manifest.files if name.startswith(f"{GOLDEN_DIR}/")]
    if len(names) != 1:
        raise BundleError(
            f"{bundle.path} holds {len(names)} files of golden samples, and a self-test needs one; earlier releases "
            "made none. Rebuild the bundle with adacorr-build, or compare it with its model: adacorr-validate"
        )
    file, manifest = bundle.file(names[0]), bundle.manifest
    try:
        content = verified_content(
            file, manifest.files[names[0]].sha256, limit_bytes=largest_golden_bytes(manifest.model)
        )
        golden = GoldenSamples.model_validate_json(content)
        return golden, [_case(sample, manifest) for sample in golden.samples]
    except (ValueError, RequestError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else str(error).rstrip(".")
        raise BundleError(f"{file}: {fault}. Rebuild the bundle with adacorr-build.") from error


def _case(sample: GoldenSample, manifest: Manifest) -> _Case:
    """Return a golden sample as a request of as many equal images as the bundle's engines take at least.

    Raises:
        ValueError: If the latents are not of the model's shape.
        RequestError: If the model can't serve the request.
    """
    build, shape = manifest.engine_build, manifest.model.latent_shape
    batch = build.profile.batch[0] if build is not None else 1
    request = SampleRequest(
        labels=(sample.label,) * batch,
        steps=sample.steps,
        guidance=sample.guidance,
        latents=np.stack([sample.initial.reshape(shape)] * batch),
    )
    check_request(request, manifest.model, manifest.schedule)
    return _Case(request=request, expected=sample.final.reshape(shape))


def _relative_l2(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / scale if scale else math.inf
