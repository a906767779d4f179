"""A table's rows do what diffusers' own schedulers do, step by step, and every config it can't follow is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError, SchedulerError
from adacorr_deploy.core.samplers import (
    NoiseSchedule,
    Sampler,
    SamplerTable,
    TimestepSpacing,
    sampler_table,
    schedule_from_config,
)

TOLERANCE = 1e-5
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
Scheduler = Any  # diffusers leaves its schedulers untyped


def scheduler_of(kind: type, steps: int, **config: object) -> Scheduler:
    """Make a scheduler whose levels are float64.

    Its own are float32, and 1 − ᾱ of the first timesteps then has three digits left: the formulas are the oracle
    here, not that rounding. `test_published_schedulers_as_they_are` takes one as it is.
    """
    scheduler = kind(clip_sample=False, **config)
    scheduler.betas = torch.tensor(schedule_from_config(config_of(scheduler)).betas, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    if not getattr(scheduler.config, "set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


def config_of(scheduler: Scheduler) -> dict[str, object]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def applied(
    table: SamplerTable,
    step: int,
    latents: torch.Tensor,
    output: torch.Tensor,
    noise: torch.Tensor,
    variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what the head part does with a row of the table."""
    of_latents, of_output, of_noise, low, high = table.coefficients[step].astype(np.float64).tolist()
    log_variance = low if variance is None else low + (variance + 1) / 2 * (high - low)
    deviation = torch.exp(torch.as_tensor(log_variance, dtype=torch.float64) / 2)
    return of_latents * latents + of_output * output + of_noise * deviation * noise


def checked_steps(steps: int) -> list[int]:
    """All steps of a short run; of a long one the first, the last and some between."""
    return sorted({*range(min(steps, 3)), *range(0, steps, max(1, steps // 40)), *range(max(0, steps - 3), steps)})


def draws(step: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max().item() <= TOLERANCE * scale


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_follows_diffusers(prediction: str, spacing: str, steps: int) -> None:
    scheduler = scheduler_of(DDIMScheduler, steps, prediction_type=prediction, timestep_spacing=spacing)
    schedule = schedule_from_config(config_of(scheduler))
    for eta in (0.0, 0.7):
        table = sampler_table(schedule, Sampler.DDIM, steps, eta=eta)
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
        for step in checked_steps(steps):
            latents, output, noise = draws(step, 3)
            timestep = int(scheduler.timesteps[step])
            expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
            assert_close(applied(table, step, latents, output, noise), expected)
        assert table.needs_noise == (eta > 0 and bool(table.coefficients[:, 2].any()))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_follows_diffusers(spacing: str, steps: int, variance: str) -> None:
    for prediction in PREDICTIONS:
        scheduler = scheduler_of(
            DDPMScheduler, steps, prediction_type=prediction, timestep_spacing=spacing, variance_type=variance
        )
        table = sampler_table(schedule_from_config(config_of(scheduler)), Sampler.DDPM, steps)
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
        for step in checked_steps(steps):
            latents, output, raw = draws(step, 3)
            predicted = torch.tanh(raw) if variance == "learned_range" else None
            joined = output if predicted is None else torch.cat([output, predicted], dim=1)
            seeds = [torch.Generator().manual_seed(step) for _ in range(2)]
            timestep = int(scheduler.timesteps[step])
            expected = scheduler.step(joined, timestep, latents, generator=seeds[0]).prev_sample
            noise = torch.randn(output.shape, generator=seeds[1], dtype=torch.float64)
            assert_close(applied(table, step, latents, output, noise, predicted), expected)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_published_schedulers_as_they_are(kind: type) -> None:
    """DiT's own config, with the scheduler's float32 arithmetic untouched."""
    scheduler: Scheduler = kind(clip_sample=False)
    scheduler.set_timesteps(50)
    sampler = Sampler.DDIM if kind is DDIMScheduler else Sampler.DDPM
    table = sampler_table(schedule_from_config(config_of(scheduler)), sampler, 50)
    for step, timestep in enumerate(scheduler.timesteps):
        latents, output = draws(step, 2)
        seeds = [torch.Generator().manual_seed(step) for _ in range(2)]
        expected = scheduler.step(output, timestep, latents, generator=seeds[0]).prev_sample
        noise = torch.randn(output.shape, generator=seeds[1], dtype=torch.float64)
        assert_close(applied(table, step, latents, output, noise), expected)


@given(
    config=st.fixed_dictionaries(
        {
            "num_train_timesteps": st.integers(20, 400),
            "beta_schedule": st.sampled_from(BETAS),
            "beta_start": st.floats(1e-4, 5e-3),
            "beta_end": st.floats(6e-3, 0.05),
            "prediction_type": st.sampled_from(PREDICTIONS),
            "timestep_spacing": st.sampled_from(SPACINGS),
            "set_alpha_to_one": st.booleans(),
            "steps_offset": st.integers(0, 1),
        }
    ),
    share=st.floats(0.0, 0.9),
    eta=st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_any_ddim_config_follows_diffusers(config: dict[str, Any], share: float, eta: float) -> None:
    steps = max(1, int(config["num_train_timesteps"] * share))
    scheduler = scheduler_of(DDIMScheduler, steps, **config)
    table = sampler_table(schedule_from_config(config_of(scheduler)), Sampler.DDIM, steps, eta=eta)
    assert np.isfinite(table.coefficients).all()
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    for step in {0, steps // 2, steps - 1}:
        latents, output, noise = draws(step, 3)
        timestep = int(scheduler.timesteps[step])
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        assert_close(applied(table, step, latents, output, noise), expected)


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_betas_are_those_of_diffusers(beta_schedule: str) -> None:
    scheduler = DDPMScheduler(clip_sample=False, beta_schedule=beta_schedule)
    betas = np.asarray(schedule_from_config(config_of(scheduler)).betas)
    np.testing.assert_allclose(betas, scheduler.betas.numpy(), rtol=1e-3 if beta_schedule.startswith("sq") else 1e-5)
    trained = schedule_from_config({**config_of(scheduler), "trained_betas": [0.1, 0.2]})
    assert trained.betas == (0.1, 0.2)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_other_solvers_lend_their_training_schedule(kind: Scheduler) -> None:
    scheduler = kind(beta_start=0.001)
    for config in (config_of(scheduler), {"_class_name": kind.__name__, "beta_start": 0.001}):
        schedule = schedule_from_config(config)
        assert schedule.timestep_spacing == scheduler.config.timestep_spacing
        assert schedule.set_alpha_to_one == scheduler.config.get("set_alpha_to_one", True)
        assert schedule.variance_type == "fixed_small"
        np.testing.assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=1e-5)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=4,
)
DIT: dict[str, object] = {"_class_name": "DDIMScheduler", "clip_sample": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "'LCMScheduler' is not known. Known: DDIMScheduler, DDPMScheduler"),
        ({"_class_name": ["x"]}, "is not known"),
        ({"clip_sample": True}, 'clip_sample is true: it clips.*Set "clip_sample": false'),
        ({"thresholding": True}, "thresholding is true"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "flow matching"),
        ({"clip_sample": "no"}, "clip_sample is 'no', allowed are true and false"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', allowed are linear, scaled_linear"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow', allowed are epsilon"),
        ({"timestep_spacing": None}, "timestep_spacing is None, allowed are leading"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"variance_type": ["fixed_small"]}, "variance_type is"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps is 10.5, allowed is a whole number"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True"),
        ({"beta_end": 1.0}, "beta_end is 1.0"),
        ({"beta_start": math.nan}, "beta_start is nan"),
        ({"beta_start": "0.1"}, "beta_start is '0.1'"),
        ({"trained_betas": "0.1"}, "trained_betas is a str"),
        ({"trained_betas": [0.1, None]}, r"trained_betas\[1\] is None"),
        ({"trained_betas": [0.1, 1.5]}, r"betas\[1\] is 1.5"),
        ({"trained_betas": []}, "got 0 values"),
        ({"steps_offset": -1}, "steps_offset is -1"),
    ],
)
def test_a_config_that_no_table_can_follow_is_refused(change: dict[str, object], message: str) -> None:
    assert schedule_from_config(DIT).prediction_type == "epsilon"
    with pytest.raises(SchedulerError, match=message):
        schedule_from_config({**DIT, **change})


def test_clipping_by_default_is_named_as_such() -> None:
    with pytest.raises(SchedulerError, match="absent in the config, and true is DDIMScheduler's default"):
        schedule_from_config({"_class_name": "DDIMScheduler"})


@given(st.dictionaries(st.sampled_from([*DIT, "betas", "trained_betas", "beta_end", "steps_offset"]), JSON_VALUES))
@settings(max_examples=50, deadline=None)
def test_an_untrusted_config_never_fails_otherwise(config: dict[str, object]) -> None:
    try:
        schedule = schedule_from_config({**DIT, **config})
    except SchedulerError:
        return
    assert all(0 < beta < 1 for beta in schedule.betas)


@pytest.mark.parametrize("steps", [0, -1, 1001, True])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(RequestError, match=f"steps is {steps}, allowed are 1 … 1000"):
        sampler_table(schedule_from_config(DIT), Sampler.DDIM, steps)


def test_an_offset_beyond_the_last_training_step_is_refused() -> None:
    schedule = schedule_from_config({**DIT, "steps_offset": 1})
    assert sampler_table(schedule, Sampler.DDIM, 999).timesteps[0] == 999
    with pytest.raises(RequestError, match="first timestep would be 1000"):
        sampler_table(schedule, Sampler.DDIM, 1000)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(RequestError, match="eta is"):
        sampler_table(schedule_from_config(DIT), Sampler.DDIM, 10, eta=eta)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(SPACINGS))
@settings(max_examples=200, deadline=None)
def test_a_table_has_as_many_rows_as_steps_and_descends(training: int, steps: int, spacing: TimestepSpacing) -> None:
    betas: NDArray[np.float64] = np.linspace(1e-4, 0.02, training)
    schedule = NoiseSchedule(betas=tuple(betas.tolist()), timestep_spacing=spacing)
    steps = min(steps, training)
    for sampler in Sampler:
        table = sampler_table(schedule, sampler, steps)
        assert table.timesteps.shape == (steps,)
        assert table.coefficients.shape == (steps, 5)
        assert table.coefficients.dtype == np.float32
        assert (np.diff(table.timesteps) < 0).all()
        assert 0 <= table.timesteps[-1] <= table.timesteps[0] < training
        assert np.isfinite(table.coefficients).all()
