"""The golden sample, made when a bundle is built: a small request, run on the original PyTorch modules."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import numpy as np

from adacorr_deploy.core.bundle import Bundle, store_in_bundle
from adacorr_deploy.core.errors import CheckpointError
from adacorr_deploy.core.golden import GOLDEN_FILE, GoldenSample
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.samplers import quiet_samplers
from adacorr_deploy.quality.reference import initial_latents, reference_of_bundle, uncached_latents
from adacorr_deploy.quality.validate import TOLERANCES
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.example_requests import example_request

if TYPE_CHECKING:
    from adacorr_deploy.core.manifest import Manifest
    from adacorr_deploy.exporters import LoadedModel

# In so few steps a strong guidance multiplies what engines round: at guidance 4, float16 misses the demo's latents by
# 6e-3, at 1.5 by 2e-3, as in a run of 50 steps at guidance 4 (bfloat16: 5e-2, 2e-2 and 2e-2).
_STEPS: Final = 4
_GUIDANCE: Final = 1.5


def store_golden_sample(bundle: Bundle, loaded: LoadedModel, progress: Progress | None = None) -> Bundle:
    """Sample an image with the original modules in float32, and store it in the bundle, for `runtime.self_test`.

    The modules are those of `loaded`: no weight is read or held twice. On top of them, DiT-XL/2 took 0.5 GB.

    Args:
        bundle: Built from `loaded`, in whatever precision and for whatever backend: none of its engines is opened.
        loaded: The checkpoint.
        progress: Told at the beginning and after each step.

    Raises:
        BundleError: If the bundle was built from another checkpoint, or can't be written.
        CheckpointError: If the model's own latents are not finite.
    """
    manifest = bundle.manifest
    request = SampleRequest(
        labels=(manifest.model.num_classes // 2,),
        steps=_steps(manifest),
        guidance=_GUIDANCE,
        seed=0,
        sampler=quiet_samplers(manifest.schedule)[0],
    )
    request = example_request(manifest.model, request, (0,))
    done = itertools.count()

    def tell() -> None:
        if progress is not None:
            progress("golden sample", next(done), request.steps)

    with reference_of_bundle(bundle, loaded) as reference:
        tell()
        initial = initial_latents(reference, request)
        final = uncached_latents(reference, request, initial, [None] * request.steps, after_step=tell)
    if not np.isfinite(final).all():
        raise CheckpointError(
            f"{loaded.name}: after {request.steps} steps of {request.sampler.value}, the original PyTorch model's "
            "latents hold NaN or infinite values. Check that its weights, configuration and scheduler belong together."
        )
    sample = GoldenSample(
        label=request.labels[0] if request.labels else None,
        sampler=request.sampler,
        steps=request.steps,
        guidance=request.guidance,
        tolerance=TOLERANCES[manifest.model.precision].trajectory,
        initial=initial[0],
        final=final[0],
    )
    stored, _ = store_in_bundle(bundle, GOLDEN_FILE, sample.model_dump_json().encode())
    return stored


def _steps(manifest: Manifest) -> int:
    """Return as few steps as the bundle's engines and its schedule take."""
    low, _, high = manifest.engine_build.profile.steps if manifest.engine_build is not None else (1, _STEPS, _STEPS)
    return min(max(low, _STEPS), high, manifest.schedule.training_steps)
