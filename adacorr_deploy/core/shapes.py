"""The letters that shapes are written in, and the names that dynamic axes carry in every ONNX part and spec.

B  batch: images of a request              K  branches: 2 with classifier-free guidance, else 1
R  rows: K·B, the conditional rows first   N  tokens of an image          D  width of a token
C, H, W  channels, height, width of a latent (or pixel) image
S  denoising steps                         U  units: the attention and MLP results of a part's blocks, in order
T  history: evaluations kept in a slot
"""

from __future__ import annotations

from typing import Final

BATCH: Final = "batch"
BRANCHES: Final = "branches"
ROWS: Final = "rows"
TOKENS: Final = "tokens"
STEPS: Final = "steps"

MAX_BATCH: Final = 10_000  # images of one request: far beyond any machine's memory for a real model
