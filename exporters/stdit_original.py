"""Checkpoints of Open-Sora 1.2's STDiT: its own state dict, from whose shapes the whole configuration follows."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Final

import torch

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.schedules import FlowSchedule
from adacorr_deploy.exporters.stdit import PIXELS_PER_LATENT, STDiT, STDiTSize
from adacorr_deploy.exporters.weight_files import StateDict, shape_of, with_weights

_MODEL: Final = "STDiT (Open-Sora 1.2)"


def is_original_stdit(state: StateDict) -> bool:
    """Say whether a state dict has the names of Open-Sora's STDiT 1.2 (1.0 has neither temporal blocks nor rates)."""
    return "temporal_blocks.0.scale_shift_table" in state and "fps_embedder.mlp.0.weight" in state


def original_schedule(model: STDiT) -> FlowSchedule:
    """Return how Open-Sora 1.2 samples: its shift is 1 for a single frame of `base_side`² pixels."""
    side = model.base_side // (PIXELS_PER_LATENT * model.size.patch)
    return FlowSchedule(flow_steps=1000, unshifted_tokens=side**2)


def stdit_from_original(state: StateDict, *, where: str, heads: int | None = None) -> STDiT:
    """Build the model from its state dict.

    Args:
        state: Weights by the original's names.
        where: The checkpoint's path, for the messages.
        heads: Attention heads; the rotary frequencies tell them, so this can only agree.

    Raises:
        CheckpointError: If a weight is missing, unexpected, of a wrong shape or not finite.
        UnsupportedModelError: If the shapes are of no such model.
    """
    size = _size_from_shapes(state, where=where)
    if heads not in (None, size.heads):
        raise UnsupportedModelError(f"{where}: --heads is {heads}, but its rotary frequencies are of {size.heads}.")
    with torch.device("meta"):
        model = STDiT(size)
    return with_weights(model, state, where=where, name=_MODEL)


def _size_from_shapes(state: StateDict, *, where: str) -> STDiTSize:
    shape = partial(shape_of, state, where=where, model=_MODEL)
    width, channels, *patch = shape("x_embedder.proj.weight", 5)
    (pairs,) = shape("rope.freqs", 1)
    outputs, _ = shape("final_layer.linear.weight", 2)
    prompt_tokens, prompt_width = shape("y_embedder.y_embedding", 2)
    side = patch[1]
    if patch != [1, side, side] or width % (2 * pairs) or width % 4 or outputs % side**2:
        raise UnsupportedModelError(
            f"{where}: patches of {patch}, a width of {width}, {pairs} rotary frequencies and {outputs} outputs a "
            f"token are of no {_MODEL}, whose patches are of one frame. Check that it is one."
        )
    out_channels = outputs // math.prod(patch)
    if out_channels not in (channels, 2 * channels):
        raise UnsupportedModelError(
            f"{where}: {out_channels} output channels are neither the {channels} of the latents nor twice as many. "
            "Check the checkpoint."
        )
    return STDiTSize(
        width=width,
        heads=width // (2 * pairs),
        depth=next(index for index in itertools.count() if f"spatial_blocks.{index}.scale_shift_table" not in state),
        patch=side,
        channels=channels,
        out_channels=out_channels,
        prompt_width=prompt_width,
        prompt_tokens=prompt_tokens,
    )
