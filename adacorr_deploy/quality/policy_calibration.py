"""Everything that given policies look up, measured and stored in a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from adacorr_deploy.caching.calibration import CachingSpan, CalibrationKey, caching_spans
from adacorr_deploy.caching.controllers import quantities_needed
from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.profile import AffineMap, Profile, Quantity, profile_name
from adacorr_deploy.core.bundle import CALIBRATION_DIR, PROFILE_DIR, measured_identity, store_in_bundle
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.samplers import quiet_samplers
from adacorr_deploy.core.untrusted import clipped, first_fault
from adacorr_deploy.quality.calibrate import CalibrationOptions, calibrate, check_calibration, partials_for
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.profile import VERSION, ProfileOptions, check_options, profile
from adacorr_deploy.quality.profile_quantities import Span
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.measurements import profile_of_key
from adacorr_deploy.runtime.sampling import calibration_key, run_of_request

Stored = tuple[Path, CalibrationKey]  # a file, and for which runs it holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What policies look up.

    Attributes:
        calibrations: Predictors and the spans of their residuals, each once.
        quantities: Of a profile.
        spans: Spans of several block parts that need an affine map.
    """

    calibrations: tuple[tuple[Predictor, tuple[CachingSpan, ...]], ...]
    quantities: frozenset[Quantity]
    spans: tuple[Span, ...]


def needs_of(pipeline: Pipeline, request: SampleRequest, policies: Sequence[Policy]) -> Needs:
    """Return all that policies look up for a request.

    Raises:
        PolicyError: If a policy is for bundles of more blocks than this one.
    """
    calibrations: dict[tuple[Predictor, tuple[CachingSpan, ...]], None] = {}
    quantities: set[Quantity] = set()
    spans: set[Span] = set()
    for policy in policies:
        caching = caching_spans(policy.spans_of(run_of_request(pipeline.bundle, request, policy)))
        quantities |= quantities_needed(policy)
        if policy.predictor.kind is PredictorKind.AFFINE:
            spans |= {(span.first, span.stop) for span in caching}
        if policy.needs_costs:
            calibrations[policy.predictor, caching] = None
        elif policy.needs_calibration:  # takes its floors from any
            calibrations[PRESETS[DEFAULT_POLICY].predictor, ()] = None
    return Needs(
        calibrations=tuple(calibrations),
        quantities=frozenset(quantities),
        spans=tuple(sorted(span for span in spans if span[1] - span[0] > 1)),
    )


def calibrate_policies(
    pipeline: Pipeline, policies: Sequence[Policy], options: CalibrationOptions, progress: Progress | None = None
) -> list[Stored]:
    """Measure what policies look up, store it in the bundle, and return the files, each with what it holds for.

    What the bundle's profile of the same runs holds besides is measured again with the rest. What an interrupted run
    has measured is taken up.

    Args:
        pipeline: An open bundle.
        policies: For whom.
        options: For which runs, and on how many images; predictor and spans are the policies'.
        progress: Told of every step.

    Raises:
        CalibrationError: If the sampler adds noise and a policy needs to know what skipping costs.
        PolicyError: If a policy is for other bundles than this one.
        RequestError: If an option is out of range, or this machine has not the memory.
        EngineError: If an engine fails.
        BundleError: If the bundle can't be written.
    """
    request = SampleRequest(
        labels=(0,) * options.images,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler or quiet_samplers(pipeline.manifest.schedule)[0],
    )
    request = example_request(pipeline.manifest.model, request, range(options.images), pipeline.example_prompts)
    needs = needs_of(pipeline, request, policies)
    if not needs.quantities and not needs.calibrations:
        names = ", ".join(policy.name for policy in policies)
        raise CalibrationError(f"{names}: nothing to measure, these policies look nothing up. Run them as they are.")
    for predictor, spans in needs.calibrations:
        if predictor.kind is not PredictorKind.AFFINE:  # its maps are not measured yet
            check_calibration(pipeline, replace(options, predictor=predictor, spans=spans))
    stored: list[Stored] = []
    measured: Profile | None = None
    if needs.quantities:
        measured, path = store_profile(pipeline, request, needs, options, progress)
        stored.append((path, measured.key))
    for predictor, spans in needs.calibrations:
        maps = _maps(measured, spans) if predictor.kind is PredictorKind.AFFINE else ()
        chosen = replace(options, predictor=predictor, spans=spans, maps=maps)
        stored.append(store_calibration(pipeline, chosen, progress))
    return stored


def store_calibration(pipeline: Pipeline, options: CalibrationOptions, progress: Progress | None = None) -> Stored:
    """Calibrate, store the result in the bundle, and return where and for what; errors as `calibrate_policies`."""
    check_calibration(pipeline, options)  # before anything is written
    partials = partials_for(pipeline, options)
    with _usable(partials):
        calibration = calibrate(pipeline, options, progress, partials)
    relative = f"{CALIBRATION_DIR}/{calibration.file_name}"
    _, path = store_in_bundle(pipeline.bundle, relative, calibration.model_dump_json().encode())
    partials.discard()
    return path, calibration.key


def store_profile(
    pipeline: Pipeline,
    request: SampleRequest,
    needs: Needs,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> tuple[Profile, Path]:
    """Profile, store the result in the bundle, and return it with its path; errors as `calibrate_policies`."""
    key = calibration_key(pipeline.bundle, request)
    before = profile_of_key(pipeline.bundle, key)  # one that can't be read is measured anew
    kept_quantities = before.quantities if before is not None else frozenset()
    kept_spans = [(each.first, each.stop) for each in (before.affine if before is not None else None) or ()]
    chosen = ProfileOptions(
        sampler=request.sampler,
        steps=options.steps,
        guidance=options.guidance,
        images=options.images,
        quantities=needs.quantities | kept_quantities,
        spans=tuple(sorted({*needs.spans, *kept_spans})),
    )
    check_options(pipeline, chosen)
    identity = {
        "measurement": VERSION,
        "bundle": measured_identity(pipeline.bundle),
        "backend": pipeline.backend.name,
        "key": key.model_dump(mode="json"),
        "images": chosen.images,
        "prompts": pipeline.example_prompts_sha256,
        "spans": chosen.spans,
    }
    folder = pipeline.bundle.file(f"{PROFILE_DIR}/.unfinished-{profile_name(key)}")
    partials = Partials(folder, identity)
    with _usable(partials):
        found = profile(pipeline, chosen, progress, partials)
    _, path = store_in_bundle(pipeline.bundle, f"{PROFILE_DIR}/{found.file_name}", found.model_dump_json().encode())
    partials.discard()
    return found, path


@contextmanager
def _usable(partials: Partials) -> Iterator[None]:
    """Refuse numbers that nothing was measured with, and forget them: others may have written what was taken up."""
    try:
        yield
    except ValueError as error:  # those of pydantic and of NumPy's linear algebra are ValueErrors too
        partials.discard()
        fault = first_fault(error) if isinstance(error, ValidationError) else clipped(str(error), 300)
        raise CalibrationError(
            f"What was measured can't be used: {fault}. What an interrupted run had left is deleted: start again."
        ) from error


def _maps(measured: Profile | None, spans: Sequence[CachingSpan]) -> tuple[AffineMap, ...]:
    found = [measured.affine_map(span.first, span.stop) for span in spans] if measured is not None else []
    return tuple(each for each in found if each is not None)
