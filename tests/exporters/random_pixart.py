"""Small random PixArts, whose every weight matters: tables and gates are drawn like the rest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import PixArtTransformer2DModel

from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.exporters.pixart_adapter import PixArtModel
from tests.exporters.conftest import loaded_as

PROMPT_TOKENS = 7  # T
PROMPT_WIDTH = 20  # E

_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "cross_attention_dim": 48,
    "num_layers": 3,
    "caption_channels": PROMPT_WIDTH,
}
# What tells the released models apart, at a sixteenth of their size.
ALPHA_512 = {"sample_size": 8, "out_channels": 8}
ALPHA_1024 = {"sample_size": 8, "out_channels": 8, "interpolation_scale": 2, "use_additional_conditions": True}
SIGMA_1024 = {"sample_size": 8, "out_channels": 8, "interpolation_scale": 2, "use_additional_conditions": False}
BARE = {"sample_size": 16, "out_channels": 4, "caption_channels": None, "cross_attention_dim": PROMPT_WIDTH}


def random_pixart(variant: Mapping[str, object], *, seed: int = 0) -> PixArtTransformer2DModel:
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(**{**_CONFIG, **variant})
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model.eval().requires_grad_(False)


def adapted(model: PixArtTransformer2DModel) -> PixArtModel:
    return PixArtModel(module=model, prompt_tokens=PROMPT_TOKENS)


def loaded_pixart(model: PixArtTransformer2DModel, schedule: NoiseSchedule | None = None) -> LoadedModel:
    return loaded_as("random-pixart", adapted(model), schedule)
