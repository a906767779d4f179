"""A table's rows do what diffusers' own schedulers do, step by step, and every config it can't follow is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.samplers import (
    Sampler,
    SamplerTable,
    allowed_samplers,
    default_sampler,
    quiet_samplers,
    sampler_table,
)
from adacorr_deploy.core.scheduler_config import schedule_from_config
from adacorr_deploy.core.schedules import Distillation, FlowSchedule, NoiseSchedule, TimestepSpacing
from tests.core.diffusers_schedulers import Scheduler, config_of, noise_schedule, scheduler_of

TOLERANCE = 1e-5
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
DIT: dict[str, object] = {"_class_name": "DDIMScheduler", "clip_sample": False}


def applied(
    table: SamplerTable,
    step: int,
    latents: torch.Tensor,
    output: torch.Tensor,
    noise: torch.Tensor,
    variance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what the head part does with a row of the table, of a sampler that carries nothing."""
    row = row_of(table, step)
    assert row["carried"] == 0
    low, high = row["log_variance_min"], row["log_variance_max"]
    log_variance = low if variance is None else low + (variance + 1) / 2 * (high - low)
    deviation = torch.exp(torch.as_tensor(log_variance, dtype=torch.float64) / 2)
    return row["latents"] * latents + row["output"] * output + row["noise"] * deviation * noise


def row_of(table: SamplerTable, step: int) -> dict[str, float]:
    return dict(zip(COLUMNS, table.coefficients[step].astype(np.float64).tolist(), strict=True))


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
    scheduler = scheduler_of(
        DDIMScheduler, steps, clip_sample=False, prediction_type=prediction, timestep_spacing=spacing
    )
    schedule = schedule_from_config(config_of(scheduler))
    for eta in (0.0, 0.7):
        table = sampler_table(schedule, Sampler.DDIM, steps, eta=eta)
        np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
        for step in checked_steps(steps):
            latents, output, noise = draws(step, 3)
            timestep = int(scheduler.timesteps[step])
            expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
            assert_close(applied(table, step, latents, output, noise), expected)
        assert any(table.noisy_steps) == (eta > 0 and bool(table.coefficients[:, 2].any()))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_follows_diffusers(spacing: str, steps: int, variance: str) -> None:
    for prediction in PREDICTIONS:
        scheduler = scheduler_of(
            DDPMScheduler,
            steps,
            clip_sample=False,
            prediction_type=prediction,
            timestep_spacing=spacing,
            variance_type=variance,
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


DPM_STEPS = [1, 2, 3, 14, 15, 50, 999]
FINALS: list[dict[str, object]] = [
    {},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min"},
]


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("steps", DPM_STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpmpp_2m_follows_diffusers_over_whole_runs(spacing: str, steps: int, algorithm: str) -> None:
    """Each step from diffusers' own latents, with what our rows carried from the step before."""
    for prediction, final in [*zip(PREDICTIONS, FINALS[1:], strict=True), ("epsilon", FINALS[0])]:
        check_dpmpp(steps, algorithm, prediction_type=prediction, timestep_spacing=spacing, **final)


def check_dpmpp(steps: int, algorithm: str, **config: object) -> None:
    scheduler = scheduler_of(DPMSolverMultistepScheduler, steps, algorithm_type=algorithm, **config)
    sampler = Sampler.DPMPP_2M if algorithm == "dpmsolver++" else Sampler.DPMPP_2M_SDE
    table = sampler_table(schedule_from_config(config_of(scheduler)), sampler, steps)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    (latents,) = draws(0, 1)
    carried = torch.zeros_like(latents)
    for step in range(steps):
        row = row_of(table, step)
        output, noise = draws(step + 1, 2)
        if scheduler.config.prediction_type == "epsilon":  # near the latents' own noise, as a model's would be:
            output = 0.9 * latents + 0.1 * output  # else the image is estimated in hundreds, and so is its rounding
        timestep = int(scheduler.timesteps[step])
        expected = scheduler.step(output, timestep, latents, variance_noise=noise).prev_sample
        found = row["latents"] * latents + row["output"] * output + row["carried"] * carried + row["noise"] * noise
        assert_close(found, expected)
        carried = row["carried_of_latents"] * latents + row["carried_of_output"] * output
        latents = expected
    assert any(table.noisy_steps) == (sampler is Sampler.DPMPP_2M_SDE and (steps > 1 or bool(table.coefficients[0, 2])))
    assert not table.needs_variance


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("original", "steps"), [(50, 1), (50, 4), (50, 8), (50, 50), (1000, 7), (30, 8), (1, 1)])
def test_lcm_follows_diffusers(prediction: str, original: int, steps: int) -> None:
    scheduler = scheduler_of(LCMScheduler, steps, original_inference_steps=original, prediction_type=prediction)
    table = sampler_table(noise_schedule(config_of(scheduler)), Sampler.LCM, steps)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    for step, timestep in enumerate(scheduler.timesteps):
        latents, output = draws(step, 2)
        seeds = [torch.Generator().manual_seed(step) for _ in range(2)]
        expected = scheduler.step(output, timestep, latents, generator=seeds[0]).prev_sample
        noise = torch.randn(output.shape, generator=seeds[1], dtype=torch.float64)
        assert_close(applied(table, step, latents, output, noise), expected)
    assert table.noisy_steps == (True,) * (steps - 1) + (False,)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_flow_euler_follows_diffusers(shift: float, steps: int) -> None:
    check_flow(steps, shift=shift)
    if steps > 1:  # a single step starts and ends at σ = 1
        check_flow(steps, shift=shift, shift_terminal=0.1)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [64, 256, 1000, 4096, 16384])
def test_dynamic_shifting_follows_diffusers(kind: str, tokens: int) -> None:
    check_flow(20, tokens=tokens, use_dynamic_shifting=True, time_shift_type=kind)
    check_flow(4, tokens=tokens, use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=0.02)


def check_flow(steps: int, *, tokens: int = 256, **config: object) -> None:
    scheduler: Scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)
    scheduler.set_timesteps(steps, **({"mu": mu} if config.get("use_dynamic_shifting") else {}))
    schedule = schedule_from_config(config_of(scheduler))
    assert allowed_samplers(schedule) == (Sampler.FLOW_EULER,)
    table = sampler_table(schedule, Sampler.FLOW_EULER, steps, tokens=tokens)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    for step in range(steps):
        latents, output, noise = draws(step, 3)
        expected = scheduler.step(output, scheduler.timesteps[step], latents).prev_sample
        assert_close(applied(table, step, latents, output, noise), expected)
    assert not any(table.noisy_steps)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_published_schedulers_as_they_are(kind: type) -> None:
    """DiT's own config, with the scheduler's float32 arithmetic untouched, over a run of 50 steps."""
    scheduler: Scheduler = kind(**({} if kind is DPMSolverMultistepScheduler else {"clip_sample": False}))
    scheduler.set_timesteps(50)
    samplers = {DDIMScheduler: Sampler.DDIM, DDPMScheduler: Sampler.DDPM, DPMSolverMultistepScheduler: Sampler.DPMPP_2M}
    table = sampler_table(schedule_from_config(config_of(scheduler)), samplers[kind], 50)
    (latents,) = draws(99, 1)
    carried = torch.zeros_like(latents)
    for step, timestep in enumerate(scheduler.timesteps):
        row = row_of(table, step)
        output = 0.9 * latents + 0.1 * draws(step, 1)[0]
        seeds = [torch.Generator().manual_seed(step) for _ in range(2)]
        expected = scheduler.step(output, timestep, latents, generator=seeds[0]).prev_sample
        noise = torch.randn(output.shape, generator=seeds[1], dtype=torch.float64)
        found = row["latents"] * latents + row["output"] * output + row["carried"] * carried + row["noise"] * noise
        assert_close(found, expected)
        carried = row["carried_of_latents"] * latents + row["carried_of_output"] * output
        latents = expected


def test_a_linear_flow_is_followed_exactly_in_any_number_of_steps() -> None:
    """Where the velocity is constant, Euler's steps add up to it: latents become the image."""
    noise, image = draws(1, 2)
    for steps in (1, 3, 20):
        table = sampler_table(FlowSchedule(flow_steps=1000, shift=2.5), Sampler.FLOW_EULER, steps)
        latents = noise
        for step in range(steps):
            latents = applied(table, step, latents, noise - image, noise)
        assert_close(latents, image)


@pytest.mark.parametrize("steps", [1, 2, 20, 30])
@pytest.mark.parametrize(("height", "width", "frames"), [(64, 64, 1), (30, 54, 15), (90, 160, 30)])
def test_open_soras_steps_are_followed(steps: int, height: int, width: int, frames: int) -> None:
    """Its loop, from its description: t evenly from 1000, moved by the clip's pixels; it predicts clip − noise."""
    schedule = FlowSchedule(flow_steps=1000, unshifted_tokens=1024)
    table = sampler_table(schedule, Sampler.FLOW_EULER, steps, tokens=height * width * frames // 4)
    ratio = math.sqrt(8 * height * 8 * width / 512**2) * math.sqrt(frames)
    shares = [1 - step / steps for step in range(steps)]
    times = [1000 * ratio * share / (1 + (ratio - 1) * share) for share in shares]
    np.testing.assert_allclose(table.timesteps, times, rtol=1e-6)
    for step, (now, after) in enumerate(zip(times, [*times[1:], 0.0], strict=True)):
        latents, velocity, noise = draws(step, 3)
        expected = latents + velocity * (now - after) / 1000
        assert_close(applied(table, step, latents, -velocity, noise), expected)


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
    scheduler = scheduler_of(DDIMScheduler, steps, clip_sample=False, **config)
    table = sampler_table(schedule_from_config(config_of(scheduler)), Sampler.DDIM, steps, eta=eta)
    assert np.isfinite(table.coefficients).all()
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    for step in {0, steps // 2, steps - 1}:
        latents, output, noise = draws(step, 3)
        timestep = int(scheduler.timesteps[step])
        expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        assert_close(applied(table, step, latents, output, noise), expected)


@pytest.mark.parametrize("steps", [0, -1, 1001, True])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(RequestError, match=f"steps is {steps}, allowed are whole numbers from 1 to 1000"):
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
    for sampler in allowed_samplers(schedule):
        if "dpmpp" in sampler.value and steps == training > 1:
            continue  # it takes one step less
        table = sampler_table(schedule, sampler, steps)
        assert table.timesteps.shape == (steps,)
        assert table.coefficients.shape == (steps, 8)
        assert table.coefficients.dtype == np.float32
        assert (np.diff(table.timesteps) < 0).all()
        assert 0 <= table.timesteps[-1] <= table.timesteps[0] < training
        assert np.isfinite(table.coefficients).all()


FLOW = FlowSchedule(flow_steps=1000)
DIFFUSION = NoiseSchedule(betas=(0.01,) * 100)
DISTILLED = NoiseSchedule(betas=(0.01,) * 100, distillation=Distillation(steps=20))


@pytest.mark.parametrize(
    ("schedule", "own", "quiet"),
    [
        (DIFFUSION, Sampler.DDIM, Sampler.DDIM),
        (DISTILLED, Sampler.LCM, Sampler.DDIM),
        (FLOW, Sampler.FLOW_EULER, Sampler.FLOW_EULER),
    ],
)
def test_a_schedule_names_its_own_sampler_and_one_without_noise(
    schedule: NoiseSchedule | FlowSchedule, own: Sampler, quiet: Sampler
) -> None:
    assert default_sampler(schedule) is own
    assert quiet_samplers(schedule)[0] is quiet
    assert not any(sampler_table(schedule, quiet, 10).noisy_steps)
    for sampler in allowed_samplers(schedule):
        for eta in (0.0, 0.5) if sampler is Sampler.DDIM else (0.0,):
            table = sampler_table(schedule, sampler, 10, eta=eta)
            assert any(table.noisy_steps) == sampler.adds_noise(eta)


@pytest.mark.parametrize(
    ("schedule", "sampler", "steps", "message"),
    [
        (FLOW, Sampler.DDPM, 10, "sampler is ddpm, allowed for this model are flow-euler"),
        (DIFFUSION, Sampler.FLOW_EULER, 10, "flow-euler is for flow matching, whose scheduler is a FlowMatchEuler"),
        (
            DIFFUSION,
            Sampler.LCM,
            4,
            "allowed for this model are ddim, ddpm, dpmpp-2m, dpmpp-2m-sde. lcm is",
        ),
        (DISTILLED, Sampler.LCM, 21, "steps is 21, allowed are whole numbers from 1 to 20"),
        (DIFFUSION, Sampler.DPMPP_2M, 100, "steps is 100, allowed are whole numbers from 1 to 99"),
        (FLOW, Sampler.FLOW_EULER, 1001, "steps is 1001, allowed are whole numbers from 1 to 1000"),
        (FlowSchedule(flow_steps=10, shift_terminal=0.1), Sampler.FLOW_EULER, 1, "gives no flow-euler table"),
    ],
)
def test_a_sampler_that_is_not_the_models_is_refused(
    schedule: NoiseSchedule | FlowSchedule, sampler: Sampler, steps: int, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        sampler_table(schedule, sampler, steps)


def test_only_ddim_takes_eta() -> None:
    with pytest.raises(RequestError, match=r"eta is 0.5, and sampler is dpmpp-2m: only ddim takes it"):
        sampler_table(DIFFUSION, Sampler.DPMPP_2M, 10, eta=0.5)
