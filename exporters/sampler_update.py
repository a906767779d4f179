"""A sampler's step as tensor operations: the end of every family's head part."""

from __future__ import annotations

import torch
from torch import Tensor

from adacorr_deploy.core.sampler_rows import COLUMNS


def sampler_update(
    row: Tensor, latents: Tensor, output: Tensor, noise: Tensor, carried: Tensor, variance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the next latents and what is carried to the next step, as `core/samplers.py` writes them.

    Args:
        row: (1, 8) float32, the step's row of the sampler's table.
        latents: (B, C, H, W) float32, as all that follow.
        output: The guided model output.
        noise: Standard normals.
        carried: From the step before.
        variance: The model's own variance output, in [−1, 1], or None if it has none.
    """
    of_latents, of_output, of_noise, low, high, of_carried, carried_of_latents, carried_of_output = row.chunk(
        len(COLUMNS), dim=1
    )
    noise = of_noise * noise
    if variance is not None:
        noise = noise * torch.exp(0.5 * (low + (variance + 1) / 2 * (high - low)))
    latents_out = of_latents * latents + of_output * output + of_carried * carried + noise
    return latents_out, carried_of_latents * latents + carried_of_output * output
