"""A tiny text-to-image pipeline, as diffusers keeps it: PixArt, T5, tokenizer and VAE, random or trained here."""

from __future__ import annotations

import json
from pathlib import Path

from tests.exporters.random_pixart import ALPHA_512, PROMPT_WIDTH, random_pixart
from tests.exporters.random_text_encoder import random_t5, write_text_encoder
from tests.exporters.random_vae import random_vae, write_vae

TOKENS = 120  # that its pipeline pads prompts to
SIDE = 8  # of the default latents; the VAE makes 2 pixels of each
SCALE = 2


def write_text_to_image(folder: Path, *, text_encoder: bool = True, vae: bool = True) -> Path:
    """Write the pipeline, and return its folder."""
    random_pixart(ALPHA_512).save_pretrained(folder / "transformer")
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "epsilon"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if text_encoder:
        write_text_encoder(folder, random_t5(width=PROMPT_WIDTH))
    if vae:
        write_vae(folder / "vae", random_vae(levels=2))
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
