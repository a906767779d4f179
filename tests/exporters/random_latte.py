"""Small random Lattes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LatteTransformer3DModel

FRAMES = 5
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 32,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 24,
    "video_length": FRAMES,
}


def random_latte(**changes: object) -> LatteTransformer3DModel:
    """A model whose every weight matters: no gate, table or output is zero."""
    torch.manual_seed(0)
    model = LatteTransformer3DModel(**{**CONFIG, **changes})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    return model.eval().requires_grad_(False)
