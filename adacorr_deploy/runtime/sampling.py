"""Sampling with a policy: finds its calibration in the bundle, makes its controller, and runs the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from adacorr_deploy.caching.block_rules import BlockRule, block_rules
from adacorr_deploy.caching.calibration import (
    Calibration,
    CalibrationKey,
    caching_spans,
    calibration_for_run,
)
from adacorr_deploy.caching.controllers import Run, controller_for_policy, quantities_needed
from adacorr_deploy.caching.decisions import Controller, Placement
from adacorr_deploy.caching.policy import UNCALIBRATED, Policy
from adacorr_deploy.caching.profile import Profile, profile_for_run
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import CalibrationError, PolicyError
from adacorr_deploy.core.samplers import quiet_samplers
from adacorr_deploy.core.schedules import Schedule
from adacorr_deploy.core.untrusted import clipped
from adacorr_deploy.runtime.denoise import LatentsObserver, Progress
from adacorr_deploy.runtime.device_decisions import sample_decided_on_device
from adacorr_deploy.runtime.measurements import calibrations, profiles
from adacorr_deploy.runtime.pipeline import Pipeline, SampleResult
from adacorr_deploy.runtime.planned_run import PlannedRun, check_revision, planned_run
from adacorr_deploy.runtime.request import SampleRequest, check_request


def sample_with_policy(
    pipeline: Pipeline,
    request: SampleRequest,
    policy: Policy,
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    on_latents: LatentsObserver | None = None,
) -> SampleResult:
    """Denoise one batch under a policy.

    Args:
        pipeline: An open bundle.
        request: What to sample; `fewer-steps` takes fewer steps than it asks for.
        policy: See `caching.policy`.
        progress: Called after each step.
        cancelled: Asked before each block; True ends the request.
        on_latents: Given a host copy of the latents after each step; on a GPU, every step then waits for it.

    Raises:
        CalibrationError: If the policy needs a calibration that the bundle doesn't hold for this run.
        RequestError: If the request is out of range.
        SamplingCancelledError: If `cancelled` returned True.
        EngineError: If an engine fails or the latents become NaN.
    """
    controller = controller_for_request(pipeline, request, policy)
    if policy.placement is Placement.DEVICE:
        return sample_decided_on_device(
            pipeline,
            planned_run(pipeline.manifest, request, controller, history=policy.history),
            rules_for_request(pipeline, request, policy),
            fresh_gates=policy.predictor.kind.fresh_gates,
            progress=progress,
            cancelled=cancelled,
            on_latents=on_latents,
        )
    result = pipeline.sample(
        replace(request, steps=policy.sampled_steps(request.steps)),
        controller,
        history=policy.history,
        progress=progress,
        cancelled=cancelled,
        on_latents=on_latents,
    )
    return of_asked_steps(result, request.steps)


def of_asked_steps(result: SampleResult, steps: int) -> SampleResult:
    """Return a result with the ρ of the asked steps: those that the sampler did not take are skipped too."""
    if result.steps == steps:
        return result
    return replace(result, rho=1 - (1 - result.rho) * result.steps / steps)


def planned_with_policy(pipeline: Pipeline, request: SampleRequest, policy: Policy) -> PlannedRun:
    """Check a request and a policy against a bundle, and plan the run; arguments and errors as `sample_with_policy`.

    Raises:
        PolicyError: Also if the policy decides on the device: its launches are in a graph, and nobody can share them.
    """
    if policy.placement is Placement.DEVICE:
        raise PolicyError(
            f"policy {policy.name} decides on the device, in a graph that shares no launch with other requests. "
            'Let it decide on the host, with decide = "block", or sample its requests one at a time.'
        )
    controller = controller_for_request(pipeline, request, policy)
    sampled = replace(request, steps=policy.sampled_steps(request.steps))
    run = planned_run(pipeline.manifest, sampled, controller, history=policy.history)
    pipeline.check_size(run.size)
    return run


def controller_for_request(pipeline: Pipeline, request: SampleRequest, policy: Policy) -> Controller:
    """Return a fresh controller, after checking that the request and the policy can be run on this bundle.

    Raises:
        CalibrationError: If the policy needs a calibration that the bundle doesn't hold for this run.
        PolicyError: If the policy protects a block that the bundle doesn't have, or takes steps again that add noise.
        RequestError: If the request is out of range.
        EngineError: If the policy decides on the device, and the backend can't.
    """
    calibration, profile = lookups_for_request(pipeline.bundle, request, policy)
    if policy.placement is Placement.DEVICE:
        pipeline.backend.decision_graphs()  # refused before the work starts, where there are none
    return controller_for_policy(policy, run_of_request(pipeline.bundle, request, policy), calibration, profile)


def lookups_for_request(
    bundle: Bundle, request: SampleRequest, policy: Policy
) -> tuple[Calibration | None, Profile | None]:
    """Return what a policy looks up, after checking that a bundle, none of whose engines is open, holds it.

    Raises:
        AdaCorrError: As `controller_for_request`.
    """
    calibration, profile = _calibration_for_request(bundle, request, policy), None
    if needed := quantities_needed(policy):
        key, measured = calibration_key(bundle, request), profiles(bundle).values()
        profile = profile_for_run(measured, key, needed, policy=policy.name, bundle=str(bundle.path))
    return calibration, profile


def run_of_request(bundle: Bundle, request: SampleRequest, policy: Policy) -> Run:
    """Return what a policy's controller must know of a request and the bundle."""
    model = bundle.manifest.model
    return Run(
        steps=policy.sampled_steps(request.steps),
        blocks=len(model.units),
        halves=model.blocks if model.halves else (),
        elements=model.latents.tokens_at(request.size) * model.width,
        frames=model.latents.frames_at(request.size),
        lags=policy.lags,
    )


def rules_for_request(pipeline: Pipeline, request: SampleRequest, policy: Policy) -> tuple[BlockRule, ...]:
    """Return the rule of each block part, of a policy that decides on the device; errors as `controller_for_request`.

    Raises:
        PolicyError: Also if the policy has no such rules.
    """
    calibration = _calibration_for_request(pipeline.bundle, request, policy)
    floors = calibration.paper_floors if calibration is not None else None
    return block_rules(policy, floors, len(pipeline.manifest.model.units))


def _calibration_for_request(bundle: Bundle, request: SampleRequest, policy: Policy) -> Calibration | None:
    """Check a request and a policy, and return the calibration that it needs, if it does."""
    check_request(request, bundle.manifest.model, bundle.manifest.schedule)
    _check_protected_blocks(policy, len(bundle.manifest.model.units))
    if not policy.needs_calibration:
        check_revision(policy.revision, request, bundle.manifest.schedule)
        return None
    _check_no_noise(request, policy, bundle.manifest.schedule)
    found = calibrations(bundle).values()
    predictor = policy.predictor if policy.needs_costs else None  # floors are those of any
    key = calibration_key(bundle, request)
    spans = caching_spans(policy.spans_of(run_of_request(bundle, request, policy)))
    return calibration_for_run(found, key, predictor, policy=policy.name, bundle=str(bundle.path), spans=spans)


def _check_no_noise(request: SampleRequest, policy: Policy, schedule: Schedule) -> None:
    if request.sampler.adds_noise(request.eta):
        raise CalibrationError(
            f"policy {policy.name} needs a calibration, and the run's sampler is {request.sampler_label}, whose noise "
            f"none can follow. Calibrated policies work with --sampler {' or '.join(quiet_samplers(schedule))}; these "
            f"need no calibration: {UNCALIBRATED}."
        )


def _check_protected_blocks(policy: Policy, blocks: int) -> None:
    last = max(policy.guards.protected_blocks, default=0)
    if last >= blocks:
        raise PolicyError(
            f"policy {policy.name}: guards.protected_blocks holds {clipped(last)}, allowed are 0 … {blocks - 1}: "
            "the bundle's block parts."
        )


def calibration_key(bundle: Bundle, request: SampleRequest) -> CalibrationKey:
    """Return what a calibration for this request must have been made for."""
    manifest = bundle.manifest
    return CalibrationKey(
        checkpoint_sha256=manifest.checkpoint_sha256,
        sampler=request.sampler.value,
        steps=request.steps,
        guidance=request.guidance,
        latent_shape=request.latent_shape(manifest.model),
    )
