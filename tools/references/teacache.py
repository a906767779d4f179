"""TeaCache: the patched forward of the FLUX example, on a stub of the transformer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Optional, Union

import numpy as np
import torch
from checkout import Checkout
from torch import Tensor, nn
from trajectories import STEPS, WIDTH, Counted, l1_change, wandering

REPOSITORY = "ali-vilab/TeaCache"
FILE = "TeaCache4FLUX/teacache_flux.py"
DEFINITIONS = ("teacache_forward",)
HOW = (
    "The function is run as the forward of a stub transformer of one block. changes[t] are mean|m_t − m_(t−1)| and "
    "mean|m_(t−1)| of the block's modulated input m; the polynomial is the one written in the function."
)
COEFFICIENTS = (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01)


class Block(Counted):
    """Normalises and modulates like an adaLN block, and keeps what it modulated."""

    modulated: Tensor

    def norm1(self, tokens: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        self.modulated = nn.functional.layer_norm(tokens, (WIDTH,)) * (1 + emb) + 0.3 * emb
        return self.modulated, *[emb] * 4

    def __call__(self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states + super().__call__(hidden_states)


def record(checkout: Checkout) -> list[dict[str, Any]]:
    known = {
        "Any": Any, "Dict": dict, "Optional": Optional, "Union": Union, "np": np, "torch": torch,
        "Transformer2DModelOutput": SimpleNamespace, "USE_PEFT_BACKEND": False,
    }  # fmt: skip
    forward = checkout.definitions(FILE, DEFINITIONS, known).teacache_forward
    return [
        _run(forward, seed, threshold) for seed in range(3) for threshold in (0.25, 0.4, 0.6, 0.8)
    ]  # the thresholds that the example names


def _run(forward: Any, seed: int, threshold: float) -> dict[str, Any]:  # noqa: ANN401  code of others
    block = Block(seed)
    model = SimpleNamespace(
        x_embedder=lambda x: x, context_embedder=lambda x: x, pos_embed=lambda ids: ids, norm_out=lambda x, temb: x,
        proj_out=lambda x: x, time_text_embed=lambda timestep, pooled: pooled, transformer_blocks=[block],
        single_transformer_blocks=[], gradient_checkpointing=False, enable_teacache=True, cnt=0, num_steps=STEPS,
        rel_l1_thresh=threshold, accumulated_rel_l1_distance=0, previous_modulated_input=None, previous_residual=None,
    )  # fmt: skip
    evaluated, changes = [], []
    before: Tensor | None = None
    for step, tokens in enumerate(wandering(seed, stride=0.2)):
        runs = block.runs
        with torch.no_grad():
            forward(
                model, tokens.clone(), torch.zeros(1, 1, WIDTH), torch.full((1, 1, WIDTH), 0.02 * step),
                torch.zeros(1), torch.zeros(1, 3), torch.zeros(1, 3),
            )  # fmt: skip
        if block.runs > runs:
            evaluated.append(step)
        changes.append(l1_change(block.modulated, block.modulated if before is None else before))
        before = block.modulated
    settings = {"steps": STEPS, "threshold": threshold, "coefficients": COEFFICIENTS}
    return {"settings": settings, "changes": changes, "evaluated": evaluated}
