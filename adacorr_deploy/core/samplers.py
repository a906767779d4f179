"""Samplers as tables: one step is a linear combination whose coefficients are known before the run.

    latents' = LATENTS · latents + OUTPUT · model output + CARRIED · carried + NOISE · exp(½ · log variance) · noise
    carried' = CARRIED_OF_LATENTS · latents + CARRIED_OF_OUTPUT · model output

The log variance interpolates between two columns by the model's own variance output where it has one
(`v` in [−1, 1], arXiv 2102.09672 eq. 15) and is 0 elsewhere, so that NOISE is then the standard deviation itself.
What is carried from one step to the next, at first 0, is a multistep solver's: its last estimate of the clean image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.sampler_rows import (
    COLUMNS,
    ImageEstimate,
    NoiseLevels,
    ddim_rows,
    ddpm_rows,
    dpmpp_2m_rows,
    lcm_rows,
)
from adacorr_deploy.core.schedules import Distillation, FlowSchedule, NoiseSchedule, Schedule
from adacorr_deploy.core.untrusted import clipped

MAX_GUIDANCE: Final = 100.0  # far beyond any use (DiT's papers: 1.5 to 4), and far from overflow


class Sampler(str, Enum):
    DDIM = "ddim"
    DDPM = "ddpm"
    DPMPP_2M = "dpmpp-2m"
    DPMPP_2M_SDE = "dpmpp-2m-sde"
    FLOW_EULER = "flow-euler"
    LCM = "lcm"

    def adds_noise(self, eta: float) -> bool:
        """Say whether its steps add noise: then two runs that differ can't be compared step by step."""
        return self in {Sampler.DDPM, Sampler.DPMPP_2M_SDE, Sampler.LCM} or (self is Sampler.DDIM and eta > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerTable:
    """A sampler's coefficients for a run of S steps."""

    timesteps: NDArray[np.float32]  # (S,), descending, in training steps; whole numbers but for flow matching
    coefficients: NDArray[np.float32]  # (S, 8), columns as COLUMNS

    @property
    def noisy_steps(self) -> tuple[bool, ...]:
        """Say of each step whether it adds noise."""
        return tuple(bool(amount != 0.0) for amount in self.coefficients[:, COLUMNS.index("noise")])

    @property
    def needs_variance(self) -> bool:
        """Say whether the noise is as strong as the model's own variance output says."""
        return bool(self.coefficients[:, COLUMNS.index("log_variance_min") : COLUMNS.index("carried")].any())


def allowed_samplers(schedule: Schedule) -> tuple[Sampler, ...]:
    """Return the samplers that a model of this schedule can be run with, the one that is its own first."""
    if isinstance(schedule, FlowSchedule):
        return (Sampler.FLOW_EULER,)
    return (*_LCM, *_OF_NOISE) if schedule.distillation is not None else tuple(_OF_NOISE)


def default_sampler(schedule: Schedule) -> Sampler:
    """Return the sampler of runs that name none."""
    return allowed_samplers(schedule)[0]


def quiet_samplers(schedule: Schedule) -> tuple[Sampler, ...]:
    """Return those of a schedule's samplers whose steps add no noise, at least one: what can be calibrated."""
    return tuple(sampler for sampler in allowed_samplers(schedule) if not sampler.adds_noise(0.0))


def check_sampler(schedule: Schedule, sampler: object, *, steps: object = 1, eta: object = 0.0) -> None:
    """Refuse what `sampler_table` can't make a table of.

    Raises:
        RequestError: If the sampler is none of the model's, or `steps` or `eta` is out of its range.
    """
    allowed = allowed_samplers(schedule)
    if not isinstance(sampler, Sampler):
        raise RequestError(f"sampler is {clipped(sampler)}, allowed for this model are {', '.join(allowed)}.")
    if sampler not in allowed:
        raise RequestError(
            f"sampler is {sampler.value}, allowed for this model are {', '.join(allowed)}.{_WHY_NOT.get(sampler, '')}"
        )
    most = most_steps(schedule, sampler)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= most:
        raise RequestError(
            f"steps is {clipped(steps)}, allowed are whole numbers from 1 to {most} (the model's training steps, and "
            f"what {sampler.value} takes of them)."
        )
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta is {clipped(eta)}, allowed are 0 … 1.")
    if eta and sampler is not Sampler.DDIM:
        raise RequestError(f"eta is {eta}, and sampler is {sampler.value}: only ddim takes it. Leave it at 0.")


def sampler_table(
    schedule: Schedule, sampler: Sampler, steps: int, *, eta: float = 0.0, tokens: int = 256
) -> SamplerTable:
    """Return the table of `steps` steps of a sampler, computed in float64.

    Args:
        schedule: The model's training schedule.
        sampler: One of `allowed_samplers(schedule)`.
        steps: Denoising steps, S.
        eta: Noise of DDIM, 0 (deterministic) … 1.
        tokens: Of an image, N: a flow-matching model's dynamic shift depends on it.

    Raises:
        RequestError: If the sampler is none of the model's, or `steps` or `eta` is out of its range.
    """
    check_sampler(schedule, sampler, steps=steps, eta=eta)
    if isinstance(schedule, FlowSchedule):
        timesteps, rows = _flow_euler(schedule, steps, tokens)
    else:
        timesteps, rows = {**_OF_NOISE, **_LCM}[sampler](schedule, steps, eta)
    if not np.isfinite(rows).all():
        raise RequestError(f"steps is {steps}, for which this model's schedule gives no {sampler.value} table.")
    return SamplerTable(timesteps=timesteps.astype(np.float32), coefficients=rows.astype(np.float32))


_WHY_NOT: Final[Mapping[Sampler, str]] = {
    Sampler.LCM: " lcm is for models distilled to it, whose scheduler is an LCMScheduler.",
    Sampler.FLOW_EULER: " flow-euler is for flow matching, whose scheduler is a FlowMatchEulerDiscreteScheduler.",
}


def most_steps(schedule: Schedule, sampler: Sampler) -> int:
    """Return how many steps a run of a sampler may have."""
    if sampler in {Sampler.DPMPP_2M, Sampler.DPMPP_2M_SDE}:
        return max(1, schedule.training_steps - 1)  # no two timesteps may be equal, and the last is above 0
    if sampler is Sampler.LCM and isinstance(schedule, NoiseSchedule) and schedule.distillation is not None:
        return schedule.distillation.steps
    return schedule.training_steps


# --- Diffusion ---------------------------------------------------------------------------------------------------


def _ddim(schedule: NoiseSchedule, steps: int, eta: float) -> _Steps:
    timesteps = _timesteps(schedule, steps)
    # DDIM steps to t − ⌊T/S⌋, which is not always the next timestep of the run: diffusers does it so, and we follow it.
    final = 1.0 if schedule.set_alpha_to_one else 1.0 - schedule.betas[0]
    levels = _levels(
        _squared_signal(schedule, timesteps), _squared_signal(schedule, timesteps - len(schedule.betas) // steps, final)
    )
    return timesteps, ddim_rows(levels, _image_estimate(schedule, levels), eta)


def _ddpm(schedule: NoiseSchedule, steps: int, eta: float) -> _Steps:
    del eta
    timesteps = _timesteps(schedule, steps)
    levels = _levels_in_turn(schedule, timesteps, final=1.0)
    noisy = (timesteps > 0).astype(np.float64)  # the step from timestep 0 adds none
    return timesteps, ddpm_rows(levels, _image_estimate(schedule, levels), noisy, schedule.variance_type)


def _dpmpp_2m(schedule: NoiseSchedule, steps: int, eta: float) -> _Steps:
    del eta
    return _dpmpp(schedule, steps, stochastic=False)


def _dpmpp_2m_sde(schedule: NoiseSchedule, steps: int, eta: float) -> _Steps:
    del eta
    return _dpmpp(schedule, steps, stochastic=True)


def _dpmpp(schedule: NoiseSchedule, steps: int, *, stochastic: bool) -> _Steps:
    timesteps = _solver_timesteps(schedule, steps)
    final = 1.0 if schedule.final_steps.sigma == "zero" else 1.0 - schedule.betas[0]
    levels = _levels_in_turn(schedule, timesteps, final=final)
    image = _image_estimate(schedule, levels)
    return timesteps, dpmpp_2m_rows(levels, image, schedule.final_steps, stochastic=stochastic)


def _lcm(schedule: NoiseSchedule, steps: int, eta: float) -> _Steps:
    del eta
    distillation = schedule.distillation or Distillation()
    stride = len(schedule.betas) // distillation.steps
    distilled = np.arange(distillation.steps, 0, -1) * stride - 1
    timesteps = distilled[np.floor(np.linspace(0, distillation.steps, steps, endpoint=False)).astype(np.int64)]
    levels = _levels_in_turn(schedule, timesteps, final=1.0)
    return timesteps, lcm_rows(levels, _image_estimate(schedule, levels), timesteps, distillation)


_Steps = tuple[NDArray[np.floating] | NDArray[np.int64], NDArray[np.float64]]  # timesteps (S,), rows (S, 8)
_Solver = Callable[[NoiseSchedule, int, float], _Steps]
_OF_NOISE: Final[Mapping[Sampler, _Solver]] = {
    Sampler.DDIM: _ddim,
    Sampler.DDPM: _ddpm,
    Sampler.DPMPP_2M: _dpmpp_2m,
    Sampler.DPMPP_2M_SDE: _dpmpp_2m_sde,
}
_LCM: Final[Mapping[Sampler, _Solver]] = {Sampler.LCM: _lcm}


def _timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    total = len(schedule.betas)
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    if schedule.timestep_spacing == "trailing":
        return _trailing(total, steps)
    return _offset(schedule, np.arange(steps)[::-1] * (total // steps))


def _solver_timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    """Return DPM-Solver's timesteps: those of one step more, without the last, which is 0."""
    total = len(schedule.betas)
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps + 1).round()[:0:-1].astype(np.int64)
    if schedule.timestep_spacing == "trailing":
        return _trailing(total, steps)
    return _offset(schedule, np.arange(steps + 1)[:0:-1] * (total // (steps + 1)))


def _trailing(total: int, steps: int) -> NDArray[np.int64]:
    # Counted from the end by index: arange with a fractional stride may yield one step too many.
    return np.round(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1


def _offset(schedule: NoiseSchedule, timesteps: NDArray[np.int64]) -> NDArray[np.int64]:
    moved = timesteps + schedule.steps_offset
    if moved[0] >= len(schedule.betas):
        raise RequestError(
            f"steps is {len(moved)}: with the model's steps_offset of {schedule.steps_offset} the first timestep would "
            f"be {moved[0]}, beyond its {len(schedule.betas)} training steps. Take fewer steps."
        )
    return moved


def _squared_signal(schedule: NoiseSchedule, timesteps: NDArray[np.int64], final: float = 1.0) -> NDArray[np.float64]:
    """Return ᾱ at each timestep, and `final` where it is negative: beyond the last step."""
    levels = np.cumprod(1.0 - np.asarray(schedule.betas, dtype=np.float64))
    return np.where(timesteps >= 0, levels[np.maximum(timesteps, 0)], final)


def _levels(now: NDArray[np.float64], after: NDArray[np.float64]) -> NoiseLevels:
    return NoiseLevels(
        signal=np.sqrt(now), noise=np.sqrt(1 - now), signal_after=np.sqrt(after), noise_after=np.sqrt(1 - after)
    )


def _levels_in_turn(schedule: NoiseSchedule, timesteps: NDArray[np.int64], *, final: float) -> NoiseLevels:
    """Return the levels of steps each of which leads to where the next starts, and the last to ᾱ = `final`."""
    now = _squared_signal(schedule, timesteps)
    return _levels(now, np.append(now[1:], final))


def _image_estimate(schedule: NoiseSchedule, levels: NoiseLevels) -> ImageEstimate:
    signal, noise = levels.signal, levels.noise
    if schedule.prediction_type == "epsilon":
        return ImageEstimate(of_latents=1 / signal, of_output=-noise / signal)
    if schedule.prediction_type == "sample":
        return ImageEstimate(of_latents=np.zeros_like(signal), of_output=np.ones_like(signal))
    return ImageEstimate(of_latents=signal, of_output=-noise)


# --- Flow matching -----------------------------------------------------------------------------------------------


def _flow_euler(schedule: FlowSchedule, steps: int, tokens: int) -> _Steps:
    """Return Euler's steps from σ to σ' (arXiv 2209.03003): DDIM's, in the levels of flow matching."""
    sigma = _flow_sigmas(schedule, steps, tokens)
    after = np.append(sigma[1:], 0.0)
    levels = NoiseLevels(signal=1 - sigma, noise=sigma, signal_after=1 - after, noise_after=after)
    image = ImageEstimate(of_latents=np.ones_like(sigma), of_output=-sigma)
    return sigma * schedule.flow_steps, ddim_rows(levels, image, 0.0)


def _flow_sigmas(schedule: FlowSchedule, steps: int, tokens: int) -> NDArray[np.float64]:
    dynamic, smallest = schedule.dynamic_shift, 1 / schedule.flow_steps
    if schedule.unshifted_tokens is not None:
        factor, smallest = math.sqrt(tokens / schedule.unshifted_tokens), 1 / steps
    elif dynamic is None:  # diffusers shifts the smallest σ, and then all that are spaced down to it: twice
        factor, smallest = schedule.shift, _shifted(np.asarray(smallest), schedule.shift).item()
    else:
        factor = dynamic.factor(tokens)
    sigma = _shifted(np.linspace(1.0, smallest, steps), factor)
    if schedule.shift_terminal is not None:
        with np.errstate(all="ignore"):  # a single step can't end anywhere but at 1
            sigma = 1 - (1 - sigma) / ((1 - sigma[-1]) / (1 - schedule.shift_terminal))
    return sigma


def _shifted(sigma: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    return factor * sigma / (1 + (factor - 1) * sigma)
