"""diffusers' own scheduler for a schedule and a sampler: what runs are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.schedules import Distillation, FlowSchedule, NoiseSchedule, Schedule
from adacorr_deploy.runtime import SampleRequest


def scheduler_for_run(schedule: Schedule, request: SampleRequest, *, tokens: int) -> SchedulerMixin:
    """Return diffusers' scheduler with the timesteps of a request.

    Args:
        schedule: The model's.
        request: Its sampler is one that the schedule allows.
        tokens: Of an image: a dynamic shift depends on them.
    """
    if isinstance(schedule, FlowSchedule):
        return _flow_euler(schedule, request.steps, tokens)
    scheduler = _OF_NOISE[request.sampler](schedule)
    scheduler.set_timesteps(request.steps)
    return scheduler


def step_options(request: SampleRequest) -> dict[str, float]:
    """Return what the scheduler's `step` is given beside the tensors and the generator."""
    return {"eta": request.eta} if request.sampler is Sampler.DDIM else {}


def _training(schedule: NoiseSchedule) -> dict[str, object]:
    return {
        "num_train_timesteps": len(schedule.betas),
        "trained_betas": list(schedule.betas),
        "prediction_type": schedule.prediction_type,
        "timestep_spacing": schedule.timestep_spacing,
        "steps_offset": schedule.steps_offset,
    }


def _ddim(schedule: NoiseSchedule) -> SchedulerMixin:
    return DDIMScheduler(**_training(schedule), clip_sample=False, set_alpha_to_one=schedule.set_alpha_to_one)


def _ddpm(schedule: NoiseSchedule) -> SchedulerMixin:
    return DDPMScheduler(**_training(schedule), clip_sample=False, variance_type=schedule.variance_type)


def _dpmpp(schedule: NoiseSchedule, algorithm: str) -> SchedulerMixin:
    final = schedule.final_steps
    return DPMSolverMultistepScheduler(
        **_training(schedule),
        algorithm_type=algorithm,
        final_sigmas_type=final.sigma,
        lower_order_final=final.lower_order,
        euler_at_final=final.euler,
    )


def _lcm(schedule: NoiseSchedule) -> SchedulerMixin:
    distillation = schedule.distillation or Distillation()
    return LCMScheduler(
        **_training(schedule),
        original_inference_steps=distillation.steps,
        timestep_scaling=distillation.timestep_scaling,
    )


_OF_NOISE: Final[Mapping[Sampler, Callable[[NoiseSchedule], SchedulerMixin]]] = {
    Sampler.DDIM: _ddim,
    Sampler.DDPM: _ddpm,
    Sampler.DPMPP_2M: lambda schedule: _dpmpp(schedule, "dpmsolver++"),
    Sampler.DPMPP_2M_SDE: lambda schedule: _dpmpp(schedule, "sde-dpmsolver++"),
    Sampler.LCM: _lcm,
}


def _flow_euler(schedule: FlowSchedule, steps: int, tokens: int) -> SchedulerMixin:
    dynamic = schedule.dynamic_shift
    common = {
        "num_train_timesteps": schedule.flow_steps,
        "shift": schedule.shift,
        "shift_terminal": schedule.shift_terminal,
    }
    if schedule.unshifted_tokens is not None:
        scheduler = FlowMatchEulerDiscreteScheduler(
            **{**common, "shift": math.sqrt(tokens / schedule.unshifted_tokens)}
        )
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
        return scheduler
    if dynamic is None:
        scheduler = FlowMatchEulerDiscreteScheduler(**common)
        scheduler.set_timesteps(steps)
        return scheduler
    scheduler = FlowMatchEulerDiscreteScheduler(**common, use_dynamic_shifting=True, time_shift_type=dynamic.kind)
    slope = (dynamic.max_shift - dynamic.base_shift) / (dynamic.max_tokens - dynamic.base_tokens)
    scheduler.set_timesteps(steps, mu=dynamic.base_shift + slope * (tokens - dynamic.base_tokens))
    return scheduler
