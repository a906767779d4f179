"""The layout of facebookresearch/DiT's checkpoints, to and from diffusers' `DiTTransformer2DModel`.

Both hold the same weights under other names, except that the original has one embedder for all blocks, joins query,
key and value, and embeds timesteps with other frequencies (see `set_frequency_shift`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Final

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.exporters.dit_config import DiTConfig, empty_dit
from adacorr_deploy.exporters.weight_files import StateDict, require_tensors, shape_of

# (width, depth) → name and heads, which the shapes don't tell: table 1 of arXiv 2212.09748.
ORIGINAL_SIZES: Final[Mapping[tuple[int, int], tuple[str, int]]] = {
    (1152, 28): ("XL", 16),
    (1024, 24): ("L", 16),
    (768, 12): ("B", 12),
    (384, 12): ("S", 6),
}

_SHARED: Final[Mapping[str, str]] = {  # original → diffusers, outside the blocks
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDER: Final[Mapping[str, str]] = {  # original → within a diffusers block's `norm1.emb`
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_BLOCK: Final[Mapping[str, str]] = {  # original → diffusers, within a block; qkv apart
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_PROJECTIONS: Final = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_POSITIONS: Final = "pos_embed"
_MODEL: Final = "DiT (original layout)"


def is_original_dit(state: Mapping[str, Tensor]) -> bool:
    """Say whether a state dict has the names of facebookresearch/DiT."""
    named_so = "x_embedder.proj.weight" in state and "t_embedder.mlp.0.weight" in state
    return named_so and "y_embedder.y_proj.fc1.weight" not in state  # of a PixArt, written from DiT


def set_frequency_shift(model: DiTTransformer2DModel, shift: float) -> None:
    """Choose how timesteps are embedded: diffusers divides the exponent by `half − 1`, the original by `half`.

    Over 1 000 training steps the phases differ by up to a radian, so weights trained with one need that one.
    """
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = shift


def original_schedule(*, learned_variance: bool) -> NoiseSchedule:
    """Return the fixed schedule that facebookresearch/DiT trains with, and the spacing that it samples with."""
    return NoiseSchedule(
        betas=tuple(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()),
        timestep_spacing="linspace",
        variance_type="learned_range" if learned_variance else "fixed_large",
    )


def diffusers_from_original(state: StateDict, *, where: str, heads: int | None = None) -> DiTTransformer2DModel:
    """Build diffusers' model from an original state dict, with the original's timestep frequencies.

    Args:
        state: Weights by the original's names.
        where: The checkpoint's path, for the messages.
        heads: Attention heads, where the size isn't one of `ORIGINAL_SIZES`.

    Raises:
        CheckpointError: If a weight is missing, unexpected, of a wrong shape or not finite.
        UnsupportedModelError: If the heads are unknown.
    """
    config = _config_from_shapes(state, where=where, heads=heads)
    model = empty_dit(config)
    require_tensors(state, original_from_diffusers(model), where=where, model=_MODEL)
    model.load_state_dict(_renamed(state, config.num_layers), assign=True, strict=True)
    model.pos_embed.pos_embed = state[_POSITIONS]
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    set_frequency_shift(model, 0)
    return model.eval().requires_grad_(False)


def original_from_diffusers(model: DiTTransformer2DModel) -> StateDict:
    """Return the weights of diffusers' model in the original layout; `model` may live on the meta device.

    The blocks' embedders must agree (`embedders_agree`): the original has one, and block 0's is taken.
    """
    weights = model.state_dict()
    state = {_POSITIONS: model.pos_embed.pos_embed}
    state.update({old: weights[f"transformer_blocks.0.norm1.emb.{new}"] for old, new in _EMBEDDER.items()})
    for kind in ("weight", "bias"):
        state.update({f"{old}.{kind}": weights[f"{new}.{kind}"] for old, new in _SHARED.items()})
        for index in range(len(model.transformer_blocks)):
            block = f"transformer_blocks.{index}"
            joined = [weights[f"{block}.{projection}.{kind}"] for projection in _PROJECTIONS]
            state[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(joined)
            for old, new in _BLOCK.items():
                state[f"blocks.{index}.{old}.{kind}"] = weights[f"{block}.{new}.{kind}"]
    return state


def _renamed(state: StateDict, depth: int) -> StateDict:
    """Return the weights under diffusers' names; parts of the joined projection are views."""
    weights: StateDict = {}
    for kind in ("weight", "bias"):
        weights.update({f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in _SHARED.items()})
        for index in range(depth):
            block = f"transformer_blocks.{index}"
            joined = state[f"blocks.{index}.attn.qkv.{kind}"].chunk(3)
            weights.update({f"{block}.{name}.{kind}": part for name, part in zip(_PROJECTIONS, joined, strict=True)})
            for old, new in _BLOCK.items():
                weights[f"{block}.{new}.{kind}"] = state[f"blocks.{index}.{old}.{kind}"]
    for index in range(depth):
        weights.update({f"transformer_blocks.{index}.norm1.emb.{new}": state[old] for old, new in _EMBEDDER.items()})
    return weights


def _config_from_shapes(state: StateDict, *, where: str, heads: int | None) -> DiTConfig:
    shape = partial(shape_of, state, where=where, model=_MODEL)
    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    _, tokens, _ = shape(_POSITIONS, 3)
    rows, _ = shape("y_embedder.embedding_table.weight", 2)
    outputs, _ = shape("final_layer.linear.weight", 2)
    depth = len({match[1] for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})
    return DiTConfig.checked(
        {
            "num_attention_heads": (heads := _heads(width, depth, heads, where)),
            "attention_head_dim": width // heads,
            "in_channels": channels,
            "out_channels": outputs // patch**2,
            "num_layers": depth,
            "sample_size": math.isqrt(tokens) * patch,
            "patch_size": patch,
            "num_embeds_ada_norm": rows - 1,
            "norm_eps": 1e-6,
        },
        where=where,
    )


def _heads(width: int, depth: int, heads: int | None, where: str) -> int:
    known = ORIGINAL_SIZES.get((width, depth))
    heads = heads or (known[1] if known else None)
    if heads is None:
        sizes = ", ".join(f"{name} ({w}×{d})" for (w, d), (name, _) in ORIGINAL_SIZES.items())
        raise UnsupportedModelError(
            f"{where}: a DiT of width {width} and {depth} blocks is none of the original sizes {sizes}, and "
            "the shapes don't tell its attention heads. Give their number with --heads N, or convert it to a "
            "diffusers folder."
        )
    if heads < 1 or width % heads:
        raise UnsupportedModelError(f"{where}: {heads} attention heads don't divide the width {width}. Give a divisor.")
    return heads
