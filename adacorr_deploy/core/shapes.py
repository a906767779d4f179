"""The letters that shapes are written in, and the names that dynamic axes carry in every ONNX part and spec.

B  batch: images (or clips) of a request   K  branches: 2 with classifier-free guidance, else 1
R  rows: K·B, the conditional rows first   N  tokens of an image          D  width of a token
C, H, W  channels, height, width of a latent (or pixel) image; F  frames of a latent clip, (C, F, H, W)
S  denoising steps                         U  units: what a part's blocks add to their tokens, one after the other
T  history: evaluations kept in a slot; also the tokens of a prompt, whose width is E
"""

from __future__ import annotations

from typing import Final

Dim = int | str  # a size, or the name of a dynamic axis

BATCH: Final = "batch"
BRANCHES: Final = "branches"
ROWS: Final = "rows"
TOKENS: Final = "tokens"
STEPS: Final = "steps"
FRAMES: Final = "frames"
HEIGHT: Final = "height"
WIDTH: Final = "width"
SIZE_AXES: Final = (FRAMES, HEIGHT, WIDTH)  # of latents, after the channels; an image has no frames
CHUNK: Final = "chunk"  # frames that are decoded at once
TILE_HEIGHT: Final = "tile_height"
TILE_WIDTH: Final = "tile_width"
IMAGE_HEIGHT: Final = "image_height"  # that a tile becomes
IMAGE_WIDTH: Final = "image_width"
IMAGE_OF_TILE: Final = {TILE_HEIGHT: IMAGE_HEIGHT, TILE_WIDTH: IMAGE_WIDTH}

MAX_BATCH: Final = 10_000  # images of one request: far beyond any machine's memory for a real model
