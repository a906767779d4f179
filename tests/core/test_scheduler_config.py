"""A scheduler's config gives the schedule that diffusers makes of it, or is refused with the reason."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from adacorr_deploy.core.errors import SchedulerError
from adacorr_deploy.core.scheduler_config import schedule_from_config
from adacorr_deploy.core.schedules import Distillation, DynamicShift, FinalSteps, FlowSchedule
from tests.core.diffusers_schedulers import config_of, noise_schedule

BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
Scheduler = Any  # diffusers leaves its schedulers untyped


@pytest.mark.parametrize("beta_schedule", BETAS)
def test_betas_are_those_of_diffusers(beta_schedule: str) -> None:
    scheduler = DDPMScheduler(clip_sample=False, beta_schedule=beta_schedule)
    betas = np.asarray(noise_schedule(config_of(scheduler)).betas)
    np.testing.assert_allclose(betas, scheduler.betas.numpy(), rtol=1e-3 if beta_schedule.startswith("sq") else 1e-5)
    trained = noise_schedule({**config_of(scheduler), "trained_betas": [0.1, 0.2]})
    assert trained.betas == (0.1, 0.2)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_other_solvers_lend_their_training_schedule(kind: Scheduler) -> None:
    scheduler = kind(beta_start=0.001)
    for config in (config_of(scheduler), {"_class_name": kind.__name__, "beta_start": 0.001}):
        schedule = noise_schedule(config)
        assert schedule.timestep_spacing == scheduler.config.timestep_spacing
        assert schedule.set_alpha_to_one == scheduler.config.get("set_alpha_to_one", True)
        assert schedule.variance_type == "fixed_small"
        np.testing.assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=1e-5)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=4,
)
LCM: dict[str, object] = {"_class_name": "LCMScheduler"}
FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC: dict[str, object] = {"_class_name": FLOW, "use_dynamic_shifting": True}
DIT: dict[str, object] = {"_class_name": "DDIMScheduler", "clip_sample": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "TCDScheduler"}, "'TCDScheduler' is not known. Known: DDIMScheduler, DDPMScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas is true: it spaces the steps over noise levels between"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas is true"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas is true"),
        ({"use_lu_lambdas": True}, "use_lu_lambdas is true"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1: it leaves out"),
        ({"lambda_min_clipped": [1]}, "lambda_min_clipped is"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type is 'one', allowed are zero, sigma_min"),
        ({"lower_order_final": 1}, "lower_order_final is 1, allowed are true and false"),
        (
            LCM | {"original_inference_steps": 0},
            "original_inference_steps is 0, allowed are 1",
        ),
        (LCM | {"original_inference_steps": 1001}, "1001, allowed are 1 … 1000: the training"),
        (LCM | {"timestep_scaling": 0}, "timestep_scaling is 0"),
        ({"_class_name": FLOW, "num_train_timesteps": 0}, "num_train_timesteps is 0, allowed are 1"),
        ({"_class_name": FLOW, "shift": 0.0}, "shift is 0.0, allowed is 0 < shift"),
        ({"_class_name": FLOW, "shift": math.inf}, "shift is inf"),
        ({"_class_name": FLOW, "shift_terminal": 1.0}, "shift_terminal is 1.0, allowed is 0 < shift_terminal < 1"),
        ({"_class_name": FLOW, "invert_sigmas": True}, "invert_sigmas is true: it runs from the image"),
        ({"_class_name": FLOW, "stochastic_sampling": True}, "stochastic_sampling is true: it adds noise"),
        ({"_class_name": FLOW, "use_karras_sigmas": True}, "use_karras_sigmas is true"),
        (DYNAMIC | {"time_shift_type": "cubic"}, "time_shift_type is 'cubic', allowed are exponential, linear"),
        (DYNAMIC | {"base_image_seq_len": 4096}, "base_image_seq_len is 4096 and max_image_seq_len is 4096"),
        (DYNAMIC | {"base_shift": 100.0}, "base_shift is 100.0"),
        (DYNAMIC | {"time_shift_type": "linear", "base_shift": -0.5}, "base_shift is -0.5, allowed is 0 <"),
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
    assert noise_schedule(DIT).prediction_type == "epsilon"
    with pytest.raises(SchedulerError, match=message):
        schedule_from_config({**DIT, **change})


def test_clipping_by_default_is_named_as_such() -> None:
    with pytest.raises(SchedulerError, match="absent in the config, and true is DDIMScheduler's default"):
        schedule_from_config({"_class_name": "DDIMScheduler"})


@given(
    st.dictionaries(
        st.sampled_from([*DIT, "betas", "trained_betas", "beta_end", "steps_offset", "lambda_min_clipped"]), JSON_VALUES
    )
)
@settings(max_examples=50, deadline=None)
def test_an_untrusted_config_never_fails_otherwise(config: dict[str, object]) -> None:
    try:
        schedule = schedule_from_config({**DIT, **config})
    except SchedulerError:
        return
    assert isinstance(schedule, FlowSchedule) or all(0 < beta < 1 for beta in schedule.betas)


def test_how_a_multistep_solver_ends_is_kept() -> None:
    config = config_of(DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", lower_order_final=False))
    assert noise_schedule(config).final_steps == FinalSteps(sigma="sigma_min", lower_order=False)
    assert noise_schedule(DIT).final_steps == FinalSteps()


def test_a_consistency_models_distillation_is_kept() -> None:
    schedule = noise_schedule(config_of(LCMScheduler(original_inference_steps=25)))
    assert schedule.distillation == Distillation(steps=25, timestep_scaling=10.0)
    assert noise_schedule({"_class_name": "LCMScheduler"}).betas == noise_schedule(config_of(LCMScheduler())).betas


def test_a_flow_matching_config_is_kept() -> None:
    assert schedule_from_config({"_class_name": FLOW}) == FlowSchedule(flow_steps=1000)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, time_shift_type="linear")
    expected = FlowSchedule(flow_steps=1000, shift=3.0, dynamic_shift=DynamicShift(kind="linear"))
    assert schedule_from_config(config_of(dynamic)) == expected


def test_a_dynamic_shift_is_refused_where_its_line_ends() -> None:
    falling = DynamicShift(base_shift=1.0, max_shift=0.5, kind="linear")
    assert falling.factor(256) == 1.0
    with pytest.raises(SchedulerError, match="For images of 100000 tokens the dynamic shift would be"):
        falling.factor(100_000)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unshifted_tokens": 0}, "unshifted_tokens is 0, allowed is 0 < tokens"),
        ({"unshifted_tokens": 1024, "shift": 3.0}, "it takes the place of every other shift"),
        ({"unshifted_tokens": 1024, "dynamic_shift": DynamicShift()}, "it takes the place of every other shift"),
        ({"unshifted_tokens": 1024, "shift_terminal": 0.1}, "it takes the place of every other shift"),
    ],
)
def test_a_shift_by_the_clips_size_stands_alone(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SchedulerError, match=message):
        FlowSchedule(flow_steps=1000, **fields)
