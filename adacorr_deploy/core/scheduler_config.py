"""From a diffusers `scheduler_config.json` to the schedule that a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, cast, get_args

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import SchedulerError
from adacorr_deploy.core.schedules import (
    MAX_TRAINING_STEPS,
    Distillation,
    DynamicShift,
    FinalSigma,
    FinalSteps,
    FlowSchedule,
    NoiseSchedule,
    PredictionType,
    Schedule,
    TimeShift,
    TimestepSpacing,
    VarianceType,
)

# The schedulers whose training schedule is DDIM's, with the values that differ where a config leaves the key out.
_CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, object]]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "DEISMultistepScheduler": {"timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "linspace"},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
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
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": None,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "variance_type": "fixed_small",
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "euler_at_final": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
_FLOW_CLASS: Final = "FlowMatchEulerDiscreteScheduler"
_FLOW_DEFAULTS: Final[Mapping[str, object]] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
# null: DPM-Solver's way of saying that the model predicts none. The other: the same variance, by way of its logarithm.
_ALSO_FIXED_SMALL: Final = (None, "fixed_small_log")
# What a config may not ask for, and why. All are false or absent in DiT's own pipelines.
_BETWEEN_LEVELS: Final = "spaces the steps over noise levels between the training ones, which no sampler here does"
_REFUSED: Final[Mapping[str, str]] = {
    "clip_sample": "clips the predicted image at every step, which no linear table can do",
    "thresholding": "rescales the predicted image by its own percentile, which no linear table can do",
    "rescale_betas_zero_snr": "makes the last beta 1, where a noise prediction says nothing about the image",
    "use_flow_sigmas": f"is flow matching, whose schedule has no betas: give a {_FLOW_CLASS}'s config",
    "use_karras_sigmas": _BETWEEN_LEVELS,
    "use_exponential_sigmas": _BETWEEN_LEVELS,
    "use_beta_sigmas": _BETWEEN_LEVELS,
    "use_lu_lambdas": _BETWEEN_LEVELS,
    "invert_sigmas": "runs from the image to the noise, which no sampler here does",
    "stochastic_sampling": "adds noise at every step, which flow-euler doesn't",
}


def schedule_from_config(config: Mapping[str, object]) -> Schedule:
    """Read a diffusers `scheduler_config.json`.

    Only the training schedule, the timestep spacing and how a run ends are taken; which solver runs on them is the
    request's choice. Keys that the config lacks get the defaults of its class (DDIMScheduler and DDPMScheduler clip by
    default).

    Raises:
        SchedulerError: If a value is missing or out of range, or the scheduler does something that is not linear in the
            model's output (clipping, thresholding) or that no table here covers (Karras' noise levels).
    """
    name = config.get("_class_name")
    if name == _FLOW_CLASS:
        return _flow_schedule({**_FLOW_DEFAULTS, **config}, config)
    if not isinstance(name, str) or name not in _CLASS_DEFAULTS:
        raise SchedulerError(
            f"Scheduler class {name!r} is not known. Known: {', '.join([*_CLASS_DEFAULTS, _FLOW_CLASS])}. "
            "Pass the config that the model was trained with by --scheduler."
        )
    values = {**_DEFAULTS, **_CLASS_DEFAULTS[name], **config}
    _check_refused(values, config, name)
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
        final_steps=FinalSteps(
            sigma=cast(FinalSigma, _choice(values, "final_sigmas_type", get_args(FinalSigma))),
            lower_order=_flag(values, "lower_order_final"),
            euler=_flag(values, "euler_at_final"),
        ),
        distillation=_distillation(values) if name == "LCMScheduler" else None,
    )


def _check_refused(values: Mapping[str, object], config: Mapping[str, object], name: str) -> None:
    for key in _REFUSED.keys() & values.keys():
        if _flag(values, key):
            absent = "" if key in config else f" (absent in the config, and true is {name}'s default)"
            raise SchedulerError(
                f'{key} is true{absent}: it {_REFUSED[key]}. Set "{key}": false if the model allows it.'
            )
    lowest = values.get("lambda_min_clipped")
    if lowest is not None and lowest != -math.inf:
        raise SchedulerError(
            f"lambda_min_clipped is {lowest!r}: it leaves out the noisiest training steps, which no sampler here does. "
            "Remove it if the model allows it."
        )


def _distillation(values: Mapping[str, object]) -> Distillation:
    return Distillation(
        steps=_integer(values, "original_inference_steps"),
        timestep_scaling=_number(values["timestep_scaling"], "timestep_scaling"),
    )


def _flow_schedule(values: Mapping[str, object], config: Mapping[str, object]) -> FlowSchedule:
    _check_refused(values, config, _FLOW_CLASS)
    terminal = values["shift_terminal"]
    return FlowSchedule(
        flow_steps=_integer(values, "num_train_timesteps"),
        shift=_number(values["shift"], "shift"),
        dynamic_shift=_dynamic_shift(values) if _flag(values, "use_dynamic_shifting") else None,
        shift_terminal=_number(terminal, "shift_terminal") if terminal else None,  # to diffusers, 0 is none too
    )


def _dynamic_shift(values: Mapping[str, object]) -> DynamicShift:
    return DynamicShift(
        base_shift=_number(values["base_shift"], "base_shift"),
        max_shift=_number(values["max_shift"], "max_shift"),
        base_tokens=_integer(values, "base_image_seq_len"),
        max_tokens=_integer(values, "max_image_seq_len"),
        kind=cast(TimeShift, _choice(values, "time_shift_type", get_args(TimeShift))),
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
    if not 0 < steps <= MAX_TRAINING_STEPS:
        raise SchedulerError(f"num_train_timesteps is {steps}, allowed are 1 … {MAX_TRAINING_STEPS}.")
    start, end = (_number(values[key], key) for key in ("beta_start", "beta_end"))
    if not (0.0 < start < 1.0 and 0.0 < end < 1.0):
        raise SchedulerError(f"beta_start is {start} and beta_end is {end}, allowed is 0 < beta < 1.")
    schedule = _choice(values, "beta_schedule", tuple(_BETA_SCHEDULES))
    return tuple(_BETA_SCHEDULES[schedule](steps, start, end).tolist())
