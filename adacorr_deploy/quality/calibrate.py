"""Calibration: what skipping costs, how a request's difficulty shows, and which offsets are ordinary.

The cost of skipping k steps is measured in two factors. The skip itself is run from the recorded trajectory, for every
step, gap and k: that takes no block launch, unless skipped steps are revised; what a skip leaves is then known once the
next step was evaluated. How much of that error the rest of the run passes on to the final latents is measured on every
third step (of longer runs, at seventeen) by running it, and interpolated: from the second evaluation on, it hardly
depends on how the error came about. So a calibration takes about 9·S evaluated steps for S steps, with revision 39·S,
or 15·S where no more than one evaluation before a skip is read (launches counted at S = 50), instead of the S²·K²·G/2
of running every skip to its end. tests/quality/test_calibrate.py runs skips to their ends and compares: within 0.2 %
where the gain was measured, within an order of magnitude where it is interpolated.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.caching.calibration import CachingSpan, Calibration, calibration_name
from adacorr_deploy.caching.decisions import SpanCache
from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, UNCALIBRATED
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.profile import AffineMap
from adacorr_deploy.core.bundle import CALIBRATION_DIR, measured_identity
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.samplers import Sampler, quiet_samplers
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.quality.calibration_study import CalibrationStudy, window_steps
from adacorr_deploy.quality.memory_need import require_memory
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.replay import Replay
from adacorr_deploy.quality.span_residuals import SpanResiduals
from adacorr_deploy.runtime import Pipeline, SampleRequest, check_request
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.request import NoiseStream, check_integer, table_from_request
from adacorr_deploy.runtime.sampling import calibration_key
from adacorr_deploy.runtime.workspace import workspace_bytes

CALIBRATION_SEED: Final = 20_260_213  # apart from the small seeds that people use
_VERSION: Final = 1  # of the measurement: another one's partial results are not taken up


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """For which runs to calibrate.

    Attributes:
        spans: Of a predictor of residuals, the block parts that keep them (`caching_spans`).
        maps: Of an affine predictor, the map of each of these spans.

    Raises:
        RequestError: If there are no images, or more than one request holds.
    """

    sampler: Sampler | None = None  # None: the model's own, or the first that adds no noise
    steps: int = 50
    guidance: float = 4.0
    images: int = 16
    predictor: Predictor = PRESETS[DEFAULT_POLICY].predictor
    spans: tuple[CachingSpan, ...] = ()
    maps: tuple[AffineMap, ...] = ()

    def __post_init__(self) -> None:
        check_integer("images", self.images, 1, MAX_BATCH)


def calibrate(
    pipeline: Pipeline,
    options: CalibrationOptions,
    progress: Progress | None = None,
    partials: Partials | None = None,
) -> Calibration:
    """Measure a bundle's runs of one sampler, number of steps and guidance. Deterministic.

    Args:
        pipeline: An open bundle.
        options: For which runs.
        progress: Told of every step.
        partials: Where finished steps are looked for and stored.

    Raises:
        CalibrationError: If the sampler adds noise (its skips can't be compared), or there are fewer than 4 steps.
        RequestError: If an option is out of range, or this machine has not the memory for so many images.
        EngineError: If an engine fails or the latents become NaN.
    """
    request, size = check_calibration(pipeline, options)
    table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    with pipeline.lease(size, references=lambda block: 1) as (space, slots):
        latents = NoiseStream(request, request.latent_shape(pipeline.manifest.model)).at(0)
        space.prepare(request, table, latents)
        residuals = SpanResiduals(predictor=options.predictor, spans=options.spans, maps=options.maps)
        replay = Replay(
            space=space,
            slots=slots,
            predictor=options.predictor,
            residuals=residuals if options.spans else None,
        )
        study = CalibrationStudy(replay, request, progress or (lambda phase, done, total: None), partials)
        study.record(latents)
        study.measure()
    return study.calibration(calibration_key(pipeline.bundle, request))


def check_calibration(pipeline: Pipeline, options: CalibrationOptions) -> tuple[SampleRequest, RunSize]:
    """Return the request that a calibration runs, and its size.

    Raises:
        CalibrationError: If the sampler adds noise, or there are fewer than 4 steps.
        RequestError: If an option is out of range, or this machine has not the memory.
    """
    request = _request(pipeline, options)
    if request.sampler.adds_noise(request.eta):
        raise CalibrationError(
            f"sampler {request.sampler.value} adds noise at every step, which calibration can't follow. Calibrated "
            f"policies work with --sampler {' or '.join(quiet_samplers(pipeline.manifest.schedule))}; these need no "
            f"calibration: {UNCALIBRATED}."
        )
    if options.steps < 4:
        raise CalibrationError(f"steps is {options.steps}; with fewer than 4 there is nothing to skip.")
    _check_spans(options, len(pipeline.manifest.model.units))
    # Residuals are kept on the host; the slots' one evaluation is there for the references beside it.
    history = 1 if options.spans else options.predictor.history
    outputs = options.predictor.revision.evaluations
    size = RunSize.of(request, history=history, whole_steps=options.predictor.whole_step, outputs=outputs)
    require_memory(
        needed_bytes(pipeline.manifest.model, size, options),
        what=f"Calibrating {options.steps} steps on {options.images} images with predictor {options.predictor.label}",
        lower="--images",
    )
    return request, size


def partials_for(pipeline: Pipeline, options: CalibrationOptions) -> Partials:
    """Return where a calibration's finished steps are kept: in the bundle, until it is complete.

    Raises:
        BundleError: If the bundle can't be written.
    """
    key = calibration_key(pipeline.bundle, _request(pipeline, options))
    name = calibration_name(key, options.predictor, options.spans)
    identity = {
        "measurement": _VERSION,
        "bundle": measured_identity(pipeline.bundle),
        "backend": pipeline.backend.name,
        "key": key.model_dump(mode="json"),
        "predictor": options.predictor.model_dump(mode="json"),
        "spans": [span.model_dump(mode="json") for span in options.spans],
        "maps": hashlib.sha256(repr(options.maps).encode()).hexdigest(),
        "images": options.images,
        "prompts": pipeline.example_prompts_sha256,
    }
    return Partials(pipeline.bundle.file(f"{CALIBRATION_DIR}/.unfinished-{name}"), identity)


def _request(pipeline: Pipeline, options: CalibrationOptions) -> SampleRequest:
    model = pipeline.manifest.model
    request = SampleRequest(
        labels=tuple(index * model.num_classes // options.images for index in range(options.images)),
        steps=options.steps,
        guidance=options.guidance,
        seed=CALIBRATION_SEED,
        sampler=options.sampler or quiet_samplers(pipeline.manifest.schedule)[0],
    )
    request = example_request(model, request, range(options.images), pipeline.example_prompts)
    check_request(request, model, pipeline.manifest.schedule)
    return request


def _check_spans(options: CalibrationOptions, parts: int) -> None:
    """Refuse a predictor of residuals without its spans: which they are is a policy's matter."""
    kind = options.predictor.kind
    if (kind.cache is SpanCache.RESIDUAL) != bool(options.spans) or any(span.stop > parts for span in options.spans):
        raise CalibrationError(
            f"predictor {kind.value} keeps what spans of block parts add, and these differ from policy to policy. "
            "Calibrate for the policies that use it: --policies NAMES."
        )
    if (kind is PredictorKind.AFFINE) != bool(options.maps):
        raise CalibrationError(
            "predictor affine needs the maps of a profile. Calibrate for policies: --policies NAMES."
        )


def needed_bytes(model: ModelSpec, size: RunSize, options: CalibrationOptions) -> int:
    """Return about how much a calibration keeps in memory.

    That is a workspace, the inputs and units (or residuals, or outputs) of the last evaluations, and the trajectory's
    latents.
    """
    tokens = model.precision.numpy.itemsize * size.rows * model.latents.tokens_at(size.latents) * model.width
    image = DType.FLOAT32.numpy.itemsize * size.batch * math.prod(model.latents.shape_at(size.latents))
    units = tokens * (len(options.spans) or sum(model.units)) if size.history else image
    recorded = window_steps(options.predictor) * (tokens + units + image) + 2 * (size.steps + 1) * image
    return workspace_bytes(model, size) + recorded
