"""The bundle that a build makes: what goes into it, what its policy may be, and what can be done with it next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adacorr_deploy.cli.calibrate import calibrate_bundle, calibrate_for_policies
from adacorr_deploy.cli.console import Advance
from adacorr_deploy.cli.model_source import path_from_model
from adacorr_deploy.core.engine_build import MAX_SIZE, CompilerOptions, Profile
from adacorr_deploy.core.errors import EngineError, PolicyError

if TYPE_CHECKING:
    from adacorr_deploy.caching.policy import Policy
    from adacorr_deploy.core.bundle import Bundle
    from adacorr_deploy.core.manifest import Manifest
    from adacorr_deploy.exporters.bundle_builder import BuildOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is built."""

    model: str
    scheduler: Path | None
    heads: int | None
    vae: Path | None
    with_vae: bool
    text_encoder: Path | None
    with_text_encoder: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What it is built into."""

    bundle: Path
    backend: str
    compiler: CompilerOptions | None
    options: BuildOptions
    calibrated: bool


def default_policy(name: str | None, *, calibrated: bool) -> str:
    """Return the bundle's policy, checked before any work.

    Raises:
        PolicyError: If it is unknown, or looks up what this build doesn't measure.
    """
    from adacorr_deploy.caching.policy import DEFAULT_POLICY, UNCALIBRATED, policy_named

    if name is None:
        return DEFAULT_POLICY
    policy = policy_named(name)
    if policy.looks_up and not calibrated:
        what = "calibration" if policy.needs_calibration else "profile"
        raise PolicyError(
            f"policy {name} needs a {what}, which this build leaves out. Add --calibrate, or choose one of "
            f"{UNCALIBRATED}."
        )
    return name


def new_bundle(source: Source, target: Target, advance: Advance) -> Bundle:
    """Build the bundle, whole or not at all.

    Raises:
        AdaCorrError: If the checkpoint can't be read or built for this target, or the output can't be written.
    """
    from adacorr_deploy.cli.output_files import check_new_folder, check_outputs
    from adacorr_deploy.core.bundle import open_bundle
    from adacorr_deploy.engines import backend_by_name
    from adacorr_deploy.engines.bundle_sessions import check_precision
    from adacorr_deploy.exporters import load_checkpoint
    from adacorr_deploy.exporters.bundle_builder import build_bundle, check_output
    from adacorr_deploy.quality.golden import store_golden_sample

    options = target.options
    backend = backend_by_name(target.backend, target.compiler)
    check_precision(options.precision, backend)
    calibrating = backend if backend.is_available() else backend_by_name("onnxruntime")
    if target.calibrated and options.precision not in calibrating.precisions:
        raise EngineError(
            f"A {options.precision.value} model can't be calibrated without a GPU for {backend.name}. Build it without "
            "--calibrate, and run adacorr-calibrate on a machine that has one."
        )
    model = path_from_model(source.model)
    check_output(target.bundle, options)
    check_new_folder(target.bundle, inputs=[model, *([source.scheduler] if source.scheduler is not None else [])])
    if target.compiler is not None and target.compiler.timing_cache is not None:
        check_outputs([target.compiler.timing_cache], bundle=target.bundle)
    loaded = load_checkpoint(
        model,
        source.scheduler,
        heads=source.heads,
        vae=source.vae,
        with_vae=source.with_vae,
        text_encoder=source.text_encoder,
        with_text_encoder=source.with_text_encoder,
    )
    calibrate = _calibration(target, calibrating.name, advance) if target.calibrated else None

    def finish(folder: Path) -> None:
        store_golden_sample(open_bundle(folder), loaded, advance)
        if calibrate is not None:
            calibrate(folder)

    return build_bundle(
        loaded,
        target.bundle,
        backend,
        options,
        progress=lambda part, done, total: advance(f"building {part}", done, total),
        finish=finish,
    )


def _calibration(target: Target, backend: str, advance: Advance) -> Callable[[Path], None]:
    """Return what calibrates the complete bundle, for what its default policy needs, before it is moved into place.

    `backend` runs it: where its own engines can't, its ONNX files do on the CPU, since a calibration is of the model.
    """
    from adacorr_deploy.caching.policy import policy_named
    from adacorr_deploy.quality.calibrate import CalibrationOptions

    options, name = CalibrationOptions(), target.options.default_policy

    def finish(folder: Path) -> None:
        if policy_named(name).looks_up:
            calibrate_for_policies(folder, [name], options, advance, backend=backend)
        else:  # for those that runs name themselves
            calibrate_bundle(folder, options, advance, backend=backend)

    return finish


# --- What to do next ---------------------------------------------------------------------------------------------


def next_steps(bundle: Bundle, *, calibrated: bool) -> list[str]:
    """Return lines whose commands run as they stand, on this bundle's model and what its engines were compiled for.

    TEXT is a prompt, and FILE is the user's own, of prompts or of embeddings.

    Args:
        bundle: The new one.
        calibrated: Whether its build measured what skipping costs.
    """
    from adacorr_deploy.caching.policy import policy_named
    from adacorr_deploy.runtime import SampleRequest
    from adacorr_deploy.runtime.images import gives_images

    manifest = bundle.manifest
    output = ["-o", "images"] if gives_images(manifest) else ["--save-latents", "latents.npy"]
    policy = policy_named(manifest.default_policy)
    ready = not policy.looks_up or (calibrated and _profile(manifest).steps[-1] >= SampleRequest().steps)
    run = ["adacorr-run", str(bundle.path), *_asked_for(manifest), *_sampler_words(manifest, policy, ready=ready)]
    calibrate = shlex.join(["adacorr-calibrate", str(bundle.path), *_measured_words(manifest, policy)])
    if not ready:
        without_reuse = shlex.join([*run, "--policy", "none", *output])
        return [
            f"Policy {manifest.default_policy} needs a calibration first: {calibrate}",
            f"Sample without reuse meanwhile: {without_reuse}",
        ]
    lines = [f"Sample from it with: {shlex.join([*run, *output])}"]
    if calibrated and manifest.model.conditions.prompt is not None:
        lines.append(f"It was calibrated on random embeddings; calibrate it on your prompts with: {calibrate}")
    return lines


def _asked_for(manifest: Manifest) -> list[str]:
    """Return the options that say what is sampled, where the model or its engines need to be told."""
    from adacorr_deploy.cli.labels import example_labels

    conditions = manifest.model.conditions
    fewest, _, most = _profile(manifest).batch
    words = []
    if conditions.num_classes:
        labels = example_labels(conditions.num_classes, fewest=fewest, most=most)
        if labels != example_labels(conditions.num_classes):
            words += ["--class-labels", ",".join(map(str, labels))]
    if conditions.prompt is not None:
        encoded = manifest.text_encoder is not None
        words += ["--prompt", "TEXT"] * fewest if encoded else ["--embeddings", _prompt_file(manifest)]
    if conditions.frame_rate:
        words += ["--fps", "24"]
    return words


def _sampler_words(manifest: Manifest, policy: Policy, *, ready: bool) -> list[str]:
    """Return the sampler that was calibrated, and as many steps as can be taken, where the defaults are others."""
    from adacorr_deploy.core.samplers import default_sampler, most_steps, quiet_samplers
    from adacorr_deploy.runtime import SampleRequest

    usual = default_sampler(manifest.schedule)
    sampler = quiet_samplers(manifest.schedule)[0] if ready and policy.looks_up else usual
    steps = min(_profile(manifest).steps[-1], most_steps(manifest.schedule, sampler))
    return [
        *(["--sampler", sampler.value] if sampler is not usual else []),
        *(["--steps", str(steps)] if steps < SampleRequest().steps else []),
    ]


def _measured_words(manifest: Manifest, policy: Policy) -> list[str]:
    """Return what adacorr-calibrate is told, so that it measures what the policy looks up."""
    from adacorr_deploy.caching.policy import DEFAULT_POLICY
    from adacorr_deploy.quality.calibrate import CalibrationOptions

    usual, profile = CalibrationOptions(), _profile(manifest)
    fewest, _, most = profile.batch
    images, steps = max(fewest, min(usual.images, most)), min(usual.steps, profile.steps[-1])
    named = policy.looks_up and manifest.default_policy != DEFAULT_POLICY
    return [
        *(["--policies", manifest.default_policy] if named else []),
        *(["--steps", str(steps)] if steps != usual.steps else []),
        *(["--images", str(images)] if images != usual.images else []),
        *(["--prompts", _prompt_file(manifest)] if manifest.model.conditions.prompt is not None else []),
    ]


def _profile(manifest: Manifest) -> Profile:
    """Return the sizes that the bundle's engines take: any, where none were compiled."""
    build = manifest.engine_build
    return build.profile if build is not None else Profile(batch=(1, 1, MAX_SIZE), steps=(1, 1, MAX_SIZE))


def _prompt_file(manifest: Manifest) -> str:
    from adacorr_deploy.cli.prompts import EMBEDDINGS_SUFFIX

    return "FILE" if manifest.text_encoder is not None else f"FILE{EMBEDDINGS_SUFFIX}"
