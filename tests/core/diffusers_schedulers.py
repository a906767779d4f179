"""diffusers' schedulers as oracles of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adacorr_deploy.core.scheduler_config import schedule_from_config
from adacorr_deploy.core.schedules import NoiseSchedule

Scheduler = Any  # diffusers leaves its schedulers untyped


def config_of(scheduler: Scheduler) -> dict[str, object]:
    """Return a scheduler's config as its file holds it."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def noise_schedule(config: Mapping[str, object]) -> NoiseSchedule:
    """Read a config that isn't flow matching's."""
    schedule = schedule_from_config(config)
    assert isinstance(schedule, NoiseSchedule)
    return schedule


def scheduler_of(kind: type, steps: int, **config: object) -> Scheduler:
    """Make a scheduler whose levels are float64.

    Its own are float32, and 1 − ᾱ of the first timesteps then has three digits left: the formulas are the oracle
    here, not that rounding. `test_published_schedulers_as_they_are` takes them as they are.
    """
    scheduler = kind(**config)
    scheduler.betas = torch.tensor(noise_schedule(config_of(scheduler)).betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    if not getattr(scheduler.config, "set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):
        levels = torch.sqrt((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)
        final = levels[0] if scheduler.config.final_sigmas_type == "sigma_min" else levels[0] * 0
        scheduler.sigmas = torch.cat([levels[scheduler.timesteps], final[None]])
    return scheduler
