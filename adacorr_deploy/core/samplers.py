"""Samplers as tables: one step of DDIM or DDPM is a linear combination whose coefficients are known before the run.

    latents' = LATENTS · latents + OUTPUT · model output + NOISE · exp(½ · log variance) · noise

The log variance interpolates between two columns by the model's own variance output where it has one
(`v` in [−1, 1], arXiv 2102.09672 eq. 15) and is 0 elsewhere, so that NOISE is then the standard deviation itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError, SchedulerError

COLUMNS: Final = ("latents", "output", "noise", "log_variance_min", "log_variance_max")
MAX_GUIDANCE: Final = 100.0  # far beyond any use (DiT's papers: 1.5 to 4), and far from overflow

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]

_MAX_TRAINING_STEPS: Final = (
    100_000  # a config is untrusted: no schedule is this long, and one that is would fill memory
)
_VARIANCE_FLOOR: Final = 1e-20  # diffusers' own, so that the logarithm of a vanishing variance exists


class Sampler(str, Enum):
    DDIM = "ddim"
    DDPM = "ddpm"


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """The training schedule of a model and how its inference timesteps are spaced; the fields are diffusers' own.

    Raises:
        SchedulerError: If there are no betas, or one lies outside (0, 1).
    """

    betas: tuple[float, ...]  # one per training step, each in (0, 1)
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    variance_type: VarianceType = "fixed_small"

    def __post_init__(self) -> None:
        if not 0 < len(self.betas) <= _MAX_TRAINING_STEPS:
            raise SchedulerError(f"betas: got {len(self.betas)} values, allowed are 1 … {_MAX_TRAINING_STEPS}.")
        for step, beta in enumerate(self.betas):
            if not 0.0 < beta < 1.0:
                raise SchedulerError(f"betas[{step}] is {beta}, allowed is 0 < beta < 1. Check the scheduler's config.")
        if not 0 <= self.steps_offset < len(self.betas):
            raise SchedulerError(f"steps_offset is {self.steps_offset}, allowed are 0 … {len(self.betas) - 1}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTable:
    """A sampler's coefficients for a run of S steps."""

    timesteps: NDArray[np.float32]  # (S,), descending, in training steps
    coefficients: NDArray[np.float32]  # (S, 5), columns as COLUMNS

    @property
    def noisy_steps(self) -> tuple[bool, ...]:
        """Say of each step whether it adds noise."""
        return tuple(bool(amount != 0.0) for amount in self.coefficients[:, COLUMNS.index("noise")])

    @property
    def needs_noise(self) -> bool:
        return any(self.noisy_steps)


# --- A diffusers config → the schedule ---------------------------------------------------------------------------

# The schedulers whose training schedule is DDIM's, with the values that differ where a config leaves the key out.
_CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, object]]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "DEISMultistepScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "UniPCMultistepScheduler": {"timestep_spacing": "linspace"},
}
_DEFAULTS: Final[Mapping[str, object]] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "use_flow_sigmas": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
}
# null: DPM-Solver's way of saying that the model predicts none. The other: the same variance, by way of its logarithm.
_ALSO_FIXED_SMALL: Final = (None, "fixed_small_log")
# What a config may not ask for, and why. All are false or absent in DiT's own pipelines.
_REFUSED: Final[Mapping[str, str]] = {
    "clip_sample": "clips the predicted image at every step, which no linear table can do",
    "thresholding": "rescales the predicted image by its own percentile, which no linear table can do",
    "rescale_betas_zero_snr": "makes the last beta 1, where a noise prediction says nothing about the image",
    "use_flow_sigmas": "is flow matching, whose schedule has no betas",
}


def schedule_from_config(config: Mapping[str, object]) -> NoiseSchedule:
    """Read a diffusers `scheduler_config.json`.

    Only the training schedule and the timestep spacing are taken; which solver runs on them is the request's choice.
    Keys that the config lacks get the defaults of its class (DDIMScheduler and DDPMScheduler clip by default).

    Raises:
        SchedulerError: If a value is missing or out of range, or the scheduler does something that is not linear in the
            model's output (clipping, thresholding).
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASS_DEFAULTS:
        raise SchedulerError(
            f"Scheduler class {name!r} is not known. Known: {', '.join(_CLASS_DEFAULTS)}. "
            "Pass the config that the model was trained with by --scheduler."
        )
    values = {**_DEFAULTS, **_CLASS_DEFAULTS[name], **config}
    for key, why in _REFUSED.items():
        if _flag(values, key):
            absent = "" if key in config else f" (absent in the config, and true is {name}'s default)"
            raise SchedulerError(f'{key} is true{absent}: it {why}. Set "{key}": false if the model allows it.')
    if values["variance_type"] in _ALSO_FIXED_SMALL:
        values["variance_type"] = "fixed_small"
    return NoiseSchedule(
        betas=_betas(values),
        prediction_type=cast(PredictionType, _choice(values, "prediction_type", get_args(PredictionType))),
        timestep_spacing=cast(
            TimestepSpacing,
            _choice(values, "timestep_spacing", get_args(TimestepSpacing)),
        ),
        steps_offset=_integer(values, "steps_offset"),
        set_alpha_to_one=_flag(values, "set_alpha_to_one"),
        variance_type=cast(VarianceType, _choice(values, "variance_type", get_args(VarianceType))),
    )


def _flag(values: Mapping[str, object], key: str) -> bool:
    value = values[key]
    if not isinstance(value, bool):
        raise SchedulerError(f"{key} is {value!r}, allowed are true and false.")
    return value


def _integer(values: Mapping[str, object], key: str) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise SchedulerError(f"{key} is {value!r}, allowed is a whole number.")
    return value


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SchedulerError(f"{where} is {value!r}, allowed is a finite number.")
    return float(value)


def _choice(values: Mapping[str, object], key: str, allowed: Sequence[str]) -> str:
    value = values[key]
    if not isinstance(value, str) or value not in allowed:
        raise SchedulerError(f"{key} is {value!r}, allowed are {', '.join(allowed)}.")
    return value


def _linear_betas(steps: int, start: float, end: float) -> NDArray[np.float64]:
    return np.linspace(start, end, steps)


def _scaled_linear_betas(steps: int, start: float, end: float) -> NDArray[np.float64]:
    return np.square(np.linspace(math.sqrt(start), math.sqrt(end), steps))


def _squared_cosine_betas(steps: int, start: float, end: float) -> NDArray[np.float64]:
    del start, end  # the cosine schedule has no other parameter than its length
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: NDArray[np.float64] = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas


_BETA_SCHEDULES: Final[Mapping[str, Callable[[int, float, float], NDArray[np.float64]]]] = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "squaredcos_cap_v2": _squared_cosine_betas,
}


def _betas(values: Mapping[str, object]) -> tuple[float, ...]:
    trained = values["trained_betas"]
    if trained is not None:
        if not isinstance(trained, Sequence) or isinstance(trained, str):
            raise SchedulerError(f"trained_betas is a {type(trained).__name__}, allowed is a list of numbers or null.")
        return tuple(_number(beta, f"trained_betas[{step}]") for step, beta in enumerate(trained))
    steps = _integer(values, "num_train_timesteps")
    if not 0 < steps <= _MAX_TRAINING_STEPS:
        raise SchedulerError(f"num_train_timesteps is {steps}, allowed are 1 … {_MAX_TRAINING_STEPS}.")
    start, end = (_number(values[key], key) for key in ("beta_start", "beta_end"))
    if not (0.0 < start < 1.0 and 0.0 < end < 1.0):
        raise SchedulerError(f"beta_start is {start} and beta_end is {end}, allowed is 0 < beta < 1.")
    schedule = _choice(values, "beta_schedule", tuple(_BETA_SCHEDULES))
    return tuple(_BETA_SCHEDULES[schedule](steps, start, end).tolist())


# --- The schedule → a table --------------------------------------------------------------------------------------


def sampler_table(schedule: NoiseSchedule, sampler: Sampler, steps: int, *, eta: float = 0.0) -> SamplerTable:
    """Return the table of `steps` steps (1 … training steps) of a sampler, computed in float64.

    Args:
        schedule: The model's training schedule.
        sampler: DDIM (arXiv 2010.02502, eq. 12) or DDPM (arXiv 2006.11239, eq. 7).
        steps: Denoising steps, S.
        eta: Noise of DDIM, 0 (deterministic) … 1; DDPM has none and ignores it.

    Raises:
        RequestError: If `steps` or `eta` is out of range.
    """
    training_steps = len(schedule.betas)
    if isinstance(steps, bool) or not 1 <= steps <= training_steps:
        raise RequestError(f"steps is {steps}, allowed are 1 … {training_steps} (the model's training steps).")
    if not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta is {eta}, allowed are 0 … 1.")
    timesteps = _timesteps(schedule, steps)
    if timesteps[0] >= training_steps:
        raise RequestError(
            f"steps is {steps}: with the model's steps_offset of {schedule.steps_offset} the first timestep would be "
            f"{timesteps[0]}, beyond its {training_steps} training steps. Take fewer steps."
        )
    rows = _ddim_rows(schedule, timesteps, eta) if sampler is Sampler.DDIM else _ddpm_rows(schedule, timesteps)
    return SamplerTable(timesteps=timesteps.astype(np.float32), coefficients=rows.astype(np.float32))


def _timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    total = len(schedule.betas)
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if schedule.timestep_spacing == "trailing":
        # Counted from the end by index: arange with a fractional stride may yield one step too many.
        return np.round(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1
    return (np.arange(steps)[::-1] * (total // steps) + schedule.steps_offset).astype(np.int64)


def _signal_levels(schedule: NoiseSchedule, timesteps: NDArray[np.int64], final: float) -> NDArray[np.float64]:
    """Return ᾱ at each timestep, and `final` where it is negative: beyond the last step."""
    levels = np.cumprod(1.0 - np.asarray(schedule.betas, dtype=np.float64))
    return np.where(timesteps >= 0, levels[np.maximum(timesteps, 0)], final)


def _image_estimate(schedule: NoiseSchedule, level: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Return how the clean image x₀ follows from the latents and the model's output: two factors, (S,) each."""
    signal, noise = np.sqrt(level), np.sqrt(1 - level)
    if schedule.prediction_type == "epsilon":
        return 1 / signal, -noise / signal
    if schedule.prediction_type == "sample":
        return np.zeros_like(level), np.ones_like(level)
    return signal, -noise


def _ddim_rows(schedule: NoiseSchedule, timesteps: NDArray[np.int64], eta: float) -> NDArray[np.float64]:
    # DDIM steps to t − ⌊T/S⌋, which is not always the next timestep of the run: diffusers does it so, and we follow it.
    stride = len(schedule.betas) // len(timesteps)
    final = 1.0 if schedule.set_alpha_to_one else 1.0 - schedule.betas[0]
    now = _signal_levels(schedule, timesteps, final)
    after = _signal_levels(schedule, timesteps - stride, final)
    variance = (1 - after) / (1 - now) * (1 - now / after)
    deviation = eta * np.sqrt(variance)
    direction = np.sqrt(np.maximum(1 - after - deviation**2, 0.0))
    image_of_latents, image_of_output = _image_estimate(schedule, now)
    # The noise estimate is what remains of the latents: (latents − √ᾱ x₀) / √(1 − ᾱ).
    noise_of_latents = (1 - np.sqrt(now) * image_of_latents) / np.sqrt(1 - now)
    noise_of_output = -np.sqrt(now) * image_of_output / np.sqrt(1 - now)
    latents = np.sqrt(after) * image_of_latents + direction * noise_of_latents
    output = np.sqrt(after) * image_of_output + direction * noise_of_output
    nothing = np.zeros_like(latents)
    return np.stack([latents, output, deviation, nothing, nothing], axis=1)


def _ddpm_rows(schedule: NoiseSchedule, timesteps: NDArray[np.int64]) -> NDArray[np.float64]:
    now = _signal_levels(schedule, timesteps, 1.0)
    after = _signal_levels(schedule, np.append(timesteps[1:], -1), 1.0)
    alpha = now / after
    beta = 1 - alpha
    of_image = np.sqrt(after) * beta / (1 - now)
    of_latents = np.sqrt(alpha) * (1 - after) / (1 - now)
    image_of_latents, image_of_output = _image_estimate(schedule, now)
    latents = of_image * image_of_latents + of_latents
    output = of_image * image_of_output
    noise, low, high = _ddpm_noise(schedule, beta, (1 - after) / (1 - now) * beta)
    noisy = (timesteps > 0).astype(np.float64)  # the step from timestep 0 adds none
    return np.stack([latents, output, noise * noisy, low * noisy, high * noisy], axis=1)


def _ddpm_noise(
    schedule: NoiseSchedule, beta: NDArray[np.float64], posterior: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the columns noise, log_variance_min and log_variance_max, (S,) each."""
    nothing = np.zeros_like(beta)
    posterior = np.maximum(posterior, _VARIANCE_FLOOR)
    if schedule.variance_type == "learned_range":
        return np.ones_like(beta), np.log(posterior), np.log(beta)
    return (
        np.sqrt(beta if schedule.variance_type == "fixed_large" else posterior),
        nothing,
        nothing,
    )
