"""Validation: a bundle against the PyTorch model that it was built from, part by part and over whole trajectories.

Parts are compared with the original modules, and the runtime's own parts with their NumPy oracle, over the tensors of a
real run. Trajectories are compared with diffusers' own loop; the engine's error and the policy's are told apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from adacorr_deploy.caching.policy import PRESETS, Policy
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.prompts import TEXT_ENCODER_PART
from adacorr_deploy.core.samplers import Sampler, default_sampler
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.quality.metrics import max_abs, psnr_db, relative_l2
from adacorr_deploy.quality.part_inputs import MIN_STEPS, part_inputs
from adacorr_deploy.quality.part_runners import (
    OracleRunner,
    PartError,
    PartRunner,
    SessionRunner,
    compared_part,
)
from adacorr_deploy.quality.reference import (
    Latents,
    diffusers_latents,
    diffusers_noises,
    initial_latents,
    reference_of_bundle,
    runtime_noises,
    uncached_latents,
)
from adacorr_deploy.runtime import Pipeline, SampleRequest, controller_for_request, sample_with_policy
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.request import check_integer

if TYPE_CHECKING:
    from adacorr_deploy.exporters import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerances:
    """What passes at a precision: relative L2, but for `trajectory_max_abs`."""

    part: float
    trajectory: float
    trajectory_max_abs: float  # in units of the latents, times their RMS where that is above 1


# Measured on the demo model (50 steps, guidance 4, DDIM and DDPM) and on random models of width 64. float32: parts 8e-6
# (the sinusoid of condition; all others below 1e-6), trajectories 7e-6, and 2e-5 at most in a pixel of the demo's.
# float16 against the float32 modules: parts 1.5e-3 (head; blocks 6e-4), trajectories 2e-3 with DDIM and 5e-3 with DDPM;
# in a single pixel 0.05, which is no fault: there is no limit on it. bfloat16 keeps three bits less, so eight times as
# much: the demo's modules in PyTorch miss by 1.4e-2 (head), its trajectories by 4e-2.
TOLERANCES: Final[Mapping[DType, Tolerances]] = {
    DType.FLOAT32: Tolerances(part=1e-4, trajectory=1e-3, trajectory_max_abs=1e-3),
    DType.FLOAT16: Tolerances(part=1e-2, trajectory=2e-2, trajectory_max_abs=math.inf),
    DType.BFLOAT16: Tolerances(part=8e-2, trajectory=1.6e-1, trajectory_max_abs=math.inf),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateOptions:
    """What is run.

    Attributes:
        steps: Of the trajectories; parts are checked at the middle step of a run of at least `MIN_STEPS`.
        guidance: As in a request.
        sampler: As in a request; None is the model's own.
        eta: As in a request.
        images: Batch size; labels are spread over the classes.
        seed: As in a request.
        policy: Whose error is told apart from the engine's. With `none` it is that of the denoise loop: nothing.

    Raises:
        RequestError: If there are no images, or more than one request holds.
    """

    steps: int = 50
    guidance: float = 4.0
    sampler: Sampler | None = None
    eta: float = 0.0
    images: int = 2
    seed: int = 0
    policy: Policy = PRESETS["none"]

    def __post_init__(self) -> None:
        check_integer("images", self.images, 1, MAX_BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryError:
    """Final latents of a run: bundle against diffusers' own loop, and what engine and policy add to it.

    Attributes:
        request: What was run.
        max_abs: Uncached bundle against diffusers: the largest difference, in units of the latents.
        rel_l2: The same, relative.
        engine_rel_l2: Uncached bundle against the same chain of the original modules in PyTorch.
        policy: Its name.
        policy_psnr_db: The policy on the bundle against the uncached bundle; infinite if they are identical.
        rms: Of diffusers' latents: about 1 for a trained model, hundreds for a random one.
        tolerances: What passes.
    """

    request: SampleRequest
    max_abs: float
    rel_l2: float
    engine_rel_l2: float
    policy: str
    policy_psnr_db: float
    rms: float
    tolerances: Tolerances

    @property
    def passed(self) -> bool:
        """Say whether bundle and engine are within tolerance; a policy may cost what it costs, but no NaN."""
        return (
            self.max_abs <= self.tolerances.trajectory_max_abs * max(1.0, self.rms)
            and self.rel_l2 <= self.tolerances.trajectory
            and self.engine_rel_l2 <= self.tolerances.trajectory
            and not math.isnan(self.policy_psnr_db)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The verdict."""

    parts: Mapping[str, PartError]
    trajectory: TrajectoryError

    @property
    def failed_parts(self) -> tuple[str, ...]:
        return tuple(name for name, error in self.parts.items() if not error)

    @property
    def passed(self) -> bool:
        return not self.failed_parts and self.trajectory.passed

    def to_json(self) -> str:
        """Return `{"parts": {name: {"max_abs", "rel_l2"}}, "trajectory": {…}, "passed"}`; what isn't finite is null."""
        run = self.trajectory
        trajectory: dict[str, str | int | float | None] = {
            "steps": run.request.steps,
            "guidance": run.request.guidance,
            "sampler": run.request.sampler.value,
            "max_abs": _finite(run.max_abs),
            "rel_l2": _finite(run.rel_l2),
            "engine_rel_l2": _finite(run.engine_rel_l2),
            "policy": run.policy,
            "policy_psnr_db": _finite(run.policy_psnr_db),
        }
        parts = {
            name: {"max_abs": _finite(error.max_abs), "rel_l2": _finite(error.rel_l2)}
            for name, error in self.parts.items()
        }
        return json.dumps({"parts": parts, "trajectory": trajectory, "passed": self.passed}, allow_nan=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def validate_bundle(
    bundle_path: Path,
    loaded: LoadedModel,
    options: ValidateOptions,
    progress: Progress | None = None,
    *,
    backend: str | None = None,
    prompts: Callable[[Pipeline], Prompts | None] = lambda engine: None,
) -> Validation:
    """Compare a bundle with the checkpoint that it was built from.

    Args:
        bundle_path: The bundle.
        loaded: The checkpoint.
        options: See `ValidateOptions`.
        progress: Told what is checked next, and at the end.
        backend: Runs the bundle, in place of the backend that it was built for.
        prompts: Gives what the images are to show, of models that take prompts; None: random ones.

    Raises:
        BundleError: If the bundle is altered, or was built from another checkpoint.
        RequestError: If an option is out of range.
        CalibrationError: If the policy needs a calibration that the bundle doesn't hold.
        EngineError: If an engine fails.
    """
    with Pipeline.open(bundle_path, backend=backend) as engine:
        if engine.manifest.decoder is not None and loaded.vae is None:
            raise BundleError(f"{bundle_path} holds a VAE's decoder, and the reference has none. Give it with --vae.")
        if engine.manifest.text_encoder is not None and loaded.text_encoder is None:
            raise BundleError(
                f"{bundle_path} holds a text encoder, and the reference has none. Give it with --text-encoder."
            )
        engine.example_prompts = prompts(engine)
        request = _request(engine, options)
        controller_for_request(engine, request, options.policy)  # what it refuses is told before the long work
        told = _Told(progress, total=len(engine.manifest.parts) + len(_RUNS))
        with reference_of_bundle(engine.bundle, loaded) as reference:
            parts = _part_errors(engine, reference, request, told)
            trajectory = _trajectory_error(engine, reference, loaded, request, options.policy, told)
    told.next("")
    return Validation(parts=parts, trajectory=trajectory)


_RUNS: Final = ("diffusers' loop", "the uncached bundle", "the uncached PyTorch parts", "the policy")


class _Told:
    """Counts what was done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def next(self, what: str) -> None:
        if self._progress is not None:
            self._progress(what, self._done, self._total)
        self._done += 1


def _request(engine: Pipeline, options: ValidateOptions) -> SampleRequest:
    model = engine.manifest.model
    request = SampleRequest(
        labels=tuple(index * model.num_classes // options.images for index in range(options.images)),
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        sampler=options.sampler or default_sampler(engine.manifest.schedule),
        eta=options.eta,
    )
    return example_request(model, request, range(options.images), engine.example_prompts)


# --- Parts -------------------------------------------------------------------------------------------------------


def _part_errors(engine: Pipeline, reference: Pipeline, request: SampleRequest, told: _Told) -> dict[str, PartError]:
    manifest = engine.manifest
    precisions = {TEXT_ENCODER_PART: manifest.text_encoder.precision} if manifest.text_encoder is not None else {}
    inputs = part_inputs(reference, replace(request, steps=max(request.steps, MIN_STEPS)))
    if unknown := sorted(manifest.parts.keys() - inputs.keys()):
        raise BundleError(f"{engine.bundle.path}: no part of this model is called {unknown[0]}. Rebuild the bundle.")
    errors, sizes = {}, manifest.model.latents.sizes_at(request.size)
    for name, part in manifest.parts.items():
        told.next(name)
        found = SessionRunner("engine", part.spec, engine.backend, engine.session(name), sizes)
        expected = _reference_runner(reference, part.spec, sizes)
        tolerance = TOLERANCES[precisions.get(name, manifest.model.precision)].part
        errors[name] = compared_part(found, expected, inputs.pop(name), tolerance)
    return errors


def _reference_runner(reference: Pipeline, spec: PartSpec, sizes: Mapping[str, int]) -> PartRunner:
    if OracleRunner.knows(spec.name):
        return OracleRunner("oracle", spec)
    return SessionRunner("reference", spec, reference.backend, reference.session(spec.name), sizes)


# --- Trajectories ------------------------------------------------------------------------------------------------


def _trajectory_error(
    engine: Pipeline,
    reference: Pipeline,
    loaded: LoadedModel,
    request: SampleRequest,
    policy: Policy,
    told: _Told,
) -> TrajectoryError:
    manifest = engine.manifest
    latents, noises = initial_latents(engine, request), diffusers_noises(engine, request)
    told.next(_RUNS[0])
    expected = diffusers_latents(loaded, manifest.schedule, request, latents)
    told.next(_RUNS[1])
    found = uncached_latents(engine, request, latents, noises)
    told.next(_RUNS[2])
    chained = uncached_latents(reference, request, latents, noises)
    told.next(_RUNS[3])
    with np.errstate(all="ignore"):  # NaN and infinity are answers here
        return TrajectoryError(
            request=request,
            max_abs=max_abs(found, expected),
            rel_l2=relative_l2(found, expected),
            engine_rel_l2=relative_l2(found, chained),
            policy=policy.name,
            policy_psnr_db=_policy_psnr_db(engine, request, policy, latents) if np.isfinite(found).all() else math.nan,
            rms=float(np.sqrt(np.mean(np.square(expected, dtype=np.float64)))),
            tolerances=TOLERANCES[manifest.model.precision],
        )


def _policy_psnr_db(engine: Pipeline, request: SampleRequest, policy: Policy, latents: Latents) -> float:
    """Return the PSNR of the policy's latents against the uncached ones, with the noise that a request draws itself."""
    uncached = uncached_latents(engine, request, latents, runtime_noises(engine, request))
    return psnr_db(sample_with_policy(engine, request, policy).latents, uncached)
