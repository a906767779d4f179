"""The rows of a sampler's table, from the noise levels of a run: one function per solver.

Everywhere latents are α · image + σ · noise; `after` says what a step leads to. All is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adacorr_deploy.core.schedules import Distillation, FinalSteps, VarianceType

COLUMNS: Final = (
    "latents",
    "output",
    "noise",
    "log_variance_min",
    "log_variance_max",
    "carried",
    "carried_of_latents",
    "carried_of_output",
)

_VARIANCE_FLOOR: Final = 1e-20  # diffusers' own, so that the logarithm of a vanishing variance exists

Column = NDArray[np.float64]  # (S,)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseLevels:
    """α and σ where each step starts and where it leads, (S,) each; α² + σ² = 1 but for flow matching."""

    signal: Column
    noise: Column
    signal_after: Column
    noise_after: Column


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEstimate:
    """How the clean image follows from the latents and the model's output: a factor for each, (S,)."""

    of_latents: Column
    of_output: Column


def ddim_rows(levels: NoiseLevels, image: ImageEstimate, eta: float) -> NDArray[np.float64]:
    """Return DDIM's rows (arXiv 2010.02502, eq. 12); of a flow-matching model's levels, with η = 0, Euler's.

    Args:
        levels: Of the run.
        image: Of the model's kind of prediction.
        eta: Noise, 0 … 1.
    """
    variance = (levels.noise_after / levels.noise) ** 2 * (1 - (levels.signal / levels.signal_after) ** 2)
    deviation = eta * np.sqrt(variance) if eta else np.zeros_like(levels.signal)
    direction = np.sqrt(np.maximum(levels.noise_after**2 - deviation**2, 0.0))
    # The noise estimate is what remains of the latents: (latents − α · image) / σ.
    noise_of_latents = (1 - levels.signal * image.of_latents) / levels.noise
    noise_of_output = -levels.signal * image.of_output / levels.noise
    return _rows(
        latents=levels.signal_after * image.of_latents + direction * noise_of_latents,
        output=levels.signal_after * image.of_output + direction * noise_of_output,
        noise=deviation,
    )


def ddpm_rows(
    levels: NoiseLevels, image: ImageEstimate, noisy: Column, variance_type: VarianceType
) -> NDArray[np.float64]:
    """Return DDPM's rows (arXiv 2006.11239, eq. 7).

    Args:
        levels: Of the run.
        image: Of the model's kind of prediction.
        noisy: 1.0 for steps that add noise, 0.0 for others.
        variance_type: Where the variance comes from.
    """
    alpha = (levels.signal / levels.signal_after) ** 2
    beta = 1 - alpha
    posterior = np.maximum((levels.noise_after / levels.noise) ** 2 * beta, _VARIANCE_FLOOR)
    of_image = levels.signal_after * beta / levels.noise**2
    of_latents = np.sqrt(alpha) * (levels.noise_after / levels.noise) ** 2
    learned = variance_type == "learned_range"
    fixed = np.sqrt(beta if variance_type == "fixed_large" else posterior)
    return _rows(
        latents=of_image * image.of_latents + of_latents,
        output=of_image * image.of_output,
        noise=noisy * (1.0 if learned else fixed),
        log_variance_min=noisy * np.log(posterior) if learned else 0.0,
        log_variance_max=noisy * np.log(beta) if learned else 0.0,
    )


def dpmpp_2m_rows(
    levels: NoiseLevels, image: ImageEstimate, final: FinalSteps, *, stochastic: bool
) -> NDArray[np.float64]:
    """Return the rows of DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) or of its SDE variant (appendix B).

    With m the image estimate of this step and m' that of the step before, which is carried to it,

        latents' = a · latents + b · (m + h/(2·h') · (m − m')) + noise

    where h = log(α_after/σ_after) − log(α/σ) and h' is that of the step before. The first step, and by `final` the
    last, has the first-order part alone.

    Args:
        levels: Of the run; where each step leads is where the next starts.
        image: Of the model's kind of prediction.
        final: See `FinalSteps`.
        stochastic: The SDE variant.
    """
    steps = len(levels.signal)
    # e^(−h) and not h: where a run ends without noise, h is infinite.
    shrink = (levels.noise_after / levels.noise) * (levels.signal / levels.signal_after)
    decay = shrink**2 if stochastic else shrink
    of_latents = levels.noise_after / levels.noise * (shrink if stochastic else 1.0)
    of_image = levels.signal_after * (1 - decay)
    second = np.zeros(steps)
    with np.errstate(divide="ignore"):
        h = -np.log(shrink)
    ordinary = slice(1, steps - 1 if _ends_in_first_order(final, steps) else steps)
    second[ordinary] = of_image[ordinary] * h[ordinary] / (2 * h[:-1][: len(h[ordinary])])
    return _rows(
        latents=of_latents + (of_image + second) * image.of_latents,
        output=(of_image + second) * image.of_output,
        noise=levels.noise_after * np.sqrt(1 - decay) if stochastic else 0.0,
        carried=-second,
        carried_of_latents=image.of_latents,
        carried_of_output=image.of_output,
    )


def _ends_in_first_order(final: FinalSteps, steps: int) -> bool:
    return final.euler or final.sigma == "zero" or (final.lower_order and steps < 15)


def lcm_rows(
    levels: NoiseLevels, image: ImageEstimate, timesteps: NDArray[np.int64], distillation: Distillation
) -> NDArray[np.float64]:
    """Return the rows of a consistency model (arXiv 2310.04378, algorithm 3, boundary conditions of its appendix).

    Args:
        levels: Of the run; its last step leads to α = 1, σ = 0.
        image: Of the model's kind of prediction.
        timesteps: Of the run, (S,).
        distillation: How the model was distilled.
    """
    data_deviation = 0.5
    scaled = timesteps * distillation.timestep_scaling
    skip = data_deviation**2 / (scaled**2 + data_deviation**2)
    out = scaled / np.sqrt(scaled**2 + data_deviation**2)
    return _rows(
        latents=levels.signal_after * (out * image.of_latents + skip),
        output=levels.signal_after * out * image.of_output,
        noise=levels.noise_after,
    )


def _rows(**columns: ArrayLike) -> NDArray[np.float64]:
    """Put columns together, (S, 8); those not given are 0."""
    length = len(np.atleast_1d(columns["latents"]))
    given = {name: np.broadcast_to(np.asarray(column, np.float64), length) for name, column in columns.items()}
    return np.stack([given.get(name, np.zeros(length)) for name in COLUMNS], axis=1)
