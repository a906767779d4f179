"""AdaCache: the block of its Open-Sora, of which one decides for all."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from checkout import Checkout
from torch import Tensor, nn
from trajectories import TOKENS, WIDTH, Counted, l1_change, wandering

REPOSITORY = "AdaCache-DiT/AdaCache"
FILE = "opensora_base/opensora/models/stdit/stdit3.py"
DEFINITIONS = ("STDiT3Block",)
HOW = (
    "STDiT3Block, with units that count how often they run, is run over all steps with the codebooks of the "
    "repository, without motion regularisation; the rate is handed on from step to step as STDiT3.forward does. "
    "changes[t] are mean|r_t − r_s| and mean|r_s| of its attention residual at an evaluation against that of the "
    "evaluation s before, null elsewhere."
)
CODEBOOKS = {
    30: {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.00: 1},
    100: {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.00: 3},
}


class Unit(Counted):
    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(0)


class CrossAttention(nn.Module):
    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, tokens: Tensor, _text: Tensor, _mask: None) -> Tensor:
        return 0.1 * tokens


def _rearranged(tokens: Tensor, _pattern: str, **_sizes: int) -> Tensor:
    """One frame: grouping its tokens by frame and back changes nothing."""
    return tokens


def record(checkout: Checkout) -> list[dict[str, Any]]:
    known = {
        "torch": torch, "nn": nn, "rearrange": _rearranged, "Attention": Unit, "Mlp": Unit, "approx_gelu": None,
        "MultiHeadCrossAttention": CrossAttention, "DropPath": nn.Identity,
        "get_layernorm": lambda size, **_: nn.LayerNorm(size, elementwise_affine=False),
        "t2i_modulate": lambda tokens, shift, scale: tokens * (1 + scale) + shift,
    }  # fmt: skip
    block = checkout.definitions(FILE, DEFINITIONS, known).STDiT3Block
    return [_run(block, seed, steps, stride) for seed in range(3) for steps in CODEBOOKS for stride in (0.3, 1.0, 3.0)]


def _run(made: Any, seed: int, steps: int, stride: float) -> dict[str, Any]:  # noqa: ANN401  code of others
    torch.manual_seed(seed)
    block = made(
        WIDTH, 1, temporal=True, blk_id=0, num_sampling_steps=steps, do_cache=True, cache_loc=[0],
        codebook=CODEBOOKS[steps],
    )  # fmt: skip
    evaluated: list[int] = []
    changes: list[list[float] | None] = []
    kept: Tensor | None = None
    rate = 1
    for step, tokens in enumerate(wandering(seed, stride=stride, steps=steps)):
        shared = {"avg_diff": 0, "count": 0, "attn_cache_rate": rate, "new_attn_cache_rate": rate}
        before = block.attn.runs
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            _, shared = block(tokens, tokens, torch.full((1, 6 * WIDTH), 0.5), shared, T=1, S=TOKENS)
        rate = shared["new_attn_cache_rate"]
        ran = block.attn.runs > before
        residual = block.st_attn_cache  # cleared after the last step, at which nothing is decided any more
        compared = ran and kept is not None and isinstance(residual, Tensor)
        changes.append(l1_change(residual, kept) if compared and kept is not None else None)
        if ran:
            evaluated.append(step)
            kept = residual
    codebook = [list(entry) for entry in CODEBOOKS[steps].items()]
    return {"settings": {"steps": steps, "codebook": codebook}, "changes": changes, "evaluated": evaluated}
