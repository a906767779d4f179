"""Golden samples, made when a bundle is built: a small request, run on the original PyTorch modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from adacorr_deploy.core.bundle import Bundle, store_in_bundle
from adacorr_deploy.core.errors import CheckpointError
from adacorr_deploy.core.golden import GOLDEN_FILE, GoldenSample, GoldenSamples
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.quality.reference import initial_latents, reference_of_bundle, uncached_latents
from adacorr_deploy.quality.validate import TOLERANCES
from adacorr_deploy.runtime import Pipeline, SampleRequest

if TYPE_CHECKING:
    from adacorr_deploy.core.manifest import Manifest
    from adacorr_deploy.exporters import LoadedModel

# In so few steps a strong guidance multiplies what engines round: at guidance 4, float16 misses the demo's latents by
# 6e-3, at 1.5 by 2e-3, as in a run of 50 steps at guidance 4 (bfloat16: 5e-2, 2e-2 and 2e-2).
_STEPS: Final = 4
_GUIDANCES: Final = (1.5, 1.0)  # both numbers of branches that engines are launched with


def store_golden_samples(bundle: Bundle, loaded: LoadedModel, progress: Progress | None = None) -> Bundle:
    """Sample with the original modules in float32, and store what comes out in the bundle, for `runtime.self_test`.

    The modules are those of `loaded`, so no weight is read or held twice; beside them it takes the activations of one
    image.

    Args:
        bundle: Built from `loaded`, in whatever precision and for whatever backend: none of its engines is opened.
        loaded: The checkpoint.
        progress: Told before each sample, and at the end.

    Raises:
        BundleError: If the bundle was built from another checkpoint, or can't be written.
        CheckpointError: If the model's own latents are not finite.
    """
    manifest = bundle.manifest
    samples = []
    with reference_of_bundle(bundle, loaded) as reference:
        for index, guidance in enumerate(_GUIDANCES):
            if progress is not None:
                progress("golden samples", index, len(_GUIDANCES))
            label = index * manifest.model.num_classes // len(_GUIDANCES)
            request = SampleRequest(labels=(label,), steps=_steps(manifest), guidance=guidance)
            samples.append(_sample(reference, request, loaded.name))
    if progress is not None:
        progress("", len(_GUIDANCES), len(_GUIDANCES))
    golden = GoldenSamples(tolerance=TOLERANCES[manifest.model.precision].trajectory, samples=tuple(samples))
    stored, _ = store_in_bundle(bundle, GOLDEN_FILE, golden.model_dump_json().encode())
    return stored


def _steps(manifest: Manifest) -> int:
    """Return as few steps as the bundle's engines and its schedule take."""
    low, _, high = manifest.engine_build.profile.steps if manifest.engine_build is not None else (1, _STEPS, _STEPS)
    return min(max(low, _STEPS), high, len(manifest.schedule.betas))


def _sample(reference: Pipeline, request: SampleRequest, model: str) -> GoldenSample:
    initial = initial_latents(reference, request)
    final = uncached_latents(reference, request, initial, [None] * request.steps)
    if not np.isfinite(final).all():
        raise CheckpointError(
            f"{model}: after {request.steps} steps of DDIM, the latents of the original PyTorch model hold NaN or "
            "infinite values. Check that weights, configuration and scheduler belong together."
        )
    (label,) = request.labels
    return GoldenSample(label=label, steps=request.steps, guidance=request.guidance, initial=initial[0], final=final[0])
