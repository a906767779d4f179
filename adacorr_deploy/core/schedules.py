"""What a model was trained on: a schedule of noise levels, and how its inference timesteps are spaced.

The fields are those of diffusers' scheduler configs (`scheduler_config.py` reads them), and the values are plain: a
manifest keeps them, and `samplers.py` makes a run's table of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

from adacorr_deploy.core.errors import SchedulerError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
FinalSigma = Literal["zero", "sigma_min"]
TimeShift = Literal["exponential", "linear"]

MAX_TRAINING_STEPS: Final = 100_000  # a config is untrusted: no schedule is this long, and it would fill memory
_MAX_SHIFT: Final = 1e4  # e^μ and shifts beyond any use (published: 1 … 12), and far from overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalSteps:
    """How a multistep solver ends: DPM-Solver++'s `final_sigmas_type`, `lower_order_final` and `euler_at_final`.

    The last step is of first order if `euler` says so, if it leads to no noise at all, or, with `lower_order`, in runs
    of fewer than 15 steps.
    """

    sigma: FinalSigma = "zero"
    lower_order: bool = True
    euler: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """How a consistency model was distilled (arXiv 2310.04378): on `steps` of the training steps, evenly spaced.

    Raises:
        SchedulerError: If a value is out of range.
    """

    steps: int = 50  # LCM's `original_inference_steps`; a run takes its timesteps from these
    timestep_scaling: float = 10.0  # of the boundary condition: the larger, the less of the latents is kept

    def __post_init__(self) -> None:
        if not 0 < self.steps <= MAX_TRAINING_STEPS:
            raise SchedulerError(f"original_inference_steps is {self.steps}, allowed are 1 … {MAX_TRAINING_STEPS}.")
        if not 0.0 < self.timestep_scaling <= _MAX_SHIFT:
            raise SchedulerError(f"timestep_scaling is {self.timestep_scaling}, allowed is 0 < scaling ≤ {_MAX_SHIFT}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """The training schedule of a diffusion model: latents are √ᾱ · image + √(1 − ᾱ) · noise.

    Raises:
        SchedulerError: If there are no betas, one lies outside (0, 1), or the other fields don't go with them.
    """

    betas: tuple[float, ...]  # one per training step, each in (0, 1)
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    variance_type: VarianceType = "fixed_small"
    final_steps: FinalSteps = field(default_factory=FinalSteps)
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.betas) <= MAX_TRAINING_STEPS:
            raise SchedulerError(f"betas: got {len(self.betas)} values, allowed are 1 … {MAX_TRAINING_STEPS}.")
        for step, beta in enumerate(self.betas):
            if not 0.0 < beta < 1.0:
                raise SchedulerError(f"betas[{step}] is {beta}, allowed is 0 < beta < 1. Check the scheduler's config.")
        if not 0 <= self.steps_offset < len(self.betas):
            raise SchedulerError(f"steps_offset is {self.steps_offset}, allowed are 0 … {len(self.betas) - 1}.")
        if self.distillation is not None and self.distillation.steps > len(self.betas):
            raise SchedulerError(
                f"original_inference_steps is {self.distillation.steps}, allowed are 1 … {len(self.betas)}: "
                "the training steps."
            )

    @property
    def training_steps(self) -> int:
        return len(self.betas)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicShift:
    """A shift that grows with the tokens of an image (arXiv 2403.03206, §5.3.2): μ is linear between two points.

    Raises:
        SchedulerError: If no line goes through the points, or it gives no usable shift.
    """

    base_shift: float = 0.5  # μ at `base_tokens`
    max_shift: float = 1.15  # μ at `max_tokens`
    base_tokens: int = 256
    max_tokens: int = 4096
    kind: TimeShift = "exponential"

    def __post_init__(self) -> None:
        if not 0 < self.base_tokens < self.max_tokens:
            raise SchedulerError(
                f"base_image_seq_len is {self.base_tokens} and max_image_seq_len is {self.max_tokens}, allowed is "
                "0 < base < max."
            )
        low = 0.0 if self.kind == "linear" else -math.log(_MAX_SHIFT)
        for name, value in (("base_shift", self.base_shift), ("max_shift", self.max_shift)):
            if not low < value < math.log(_MAX_SHIFT):
                raise SchedulerError(f"{name} is {value}, allowed is {low:.3g} < {name} < {math.log(_MAX_SHIFT):.3g}.")

    def factor(self, tokens: int) -> float:
        """Return the shift for an image of so many tokens, > 0: e^μ, or μ itself.

        Raises:
            SchedulerError: If the line gives none so far from its two points.
        """
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        factor = mu if self.kind == "linear" else math.exp(min(mu, 700.0))
        if not 0.0 < factor <= _MAX_SHIFT:
            raise SchedulerError(
                f"For images of {tokens} tokens the dynamic shift would be {factor:.3g}, allowed is 0 < shift ≤ "
                f"{_MAX_SHIFT:g}. Check base_shift, max_shift and the two sequence lengths of the scheduler's config."
            )
        return factor


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSchedule:
    """The schedule of a flow-matching model: latents are (1 − σ) · image + σ · noise, and it predicts noise − image.

    Raises:
        SchedulerError: If a value is out of range.
    """

    flow_steps: int  # what σ = 1 is as a timestep, diffusers' num_train_timesteps
    shift: float = 1.0  # σ ← shift·σ / (1 + (shift − 1)·σ)
    dynamic_shift: DynamicShift | None = None  # takes the place of `shift`
    shift_terminal: float | None = None  # the last σ of a run, if they are to be stretched to it
    unshifted_tokens: int | None = None  # Open-Sora's way instead: σ = 1, …, 1/S evenly, shifted by √(N / this)

    def __post_init__(self) -> None:
        if not 0 < self.flow_steps <= MAX_TRAINING_STEPS:
            raise SchedulerError(f"num_train_timesteps is {self.flow_steps}, allowed are 1 … {MAX_TRAINING_STEPS}.")
        if not 0.0 < self.shift <= _MAX_SHIFT:
            raise SchedulerError(f"shift is {self.shift}, allowed is 0 < shift ≤ {_MAX_SHIFT:g}.")
        if self.shift_terminal is not None and not 0.0 < self.shift_terminal < 1.0:
            raise SchedulerError(
                f"shift_terminal is {self.shift_terminal}, allowed is 0 < shift_terminal < 1, or null."
            )
        if self.unshifted_tokens is not None:
            self._check_unshifted_tokens(self.unshifted_tokens)

    def _check_unshifted_tokens(self, tokens: int) -> None:
        if not 0 < tokens <= _MAX_SHIFT**2:
            raise SchedulerError(f"unshifted_tokens is {tokens}, allowed is 0 < tokens ≤ {_MAX_SHIFT**2:g}.")
        if (self.shift, self.dynamic_shift, self.shift_terminal) != (1.0, None, None):
            raise SchedulerError(f"unshifted_tokens is {tokens}: it takes the place of every other shift. Remove one.")

    @property
    def training_steps(self) -> int:
        return self.flow_steps


Schedule = NoiseSchedule | FlowSchedule
