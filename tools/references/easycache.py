"""EasyCache: the patched forward of the Wan example, on a stub of the transformer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from checkout import Checkout
from torch import Tensor
from trajectories import STEPS, TOKENS, WIDTH, Counted, l1_change, straight, wandering

REPOSITORY = "H-EmbodVis/EasyCache"
FILE = "EasyCache4Wan2.1/easycache_generate.py"
DEFINITIONS = ("easycache_forward",)
HOW = (
    "The function is run as the forward of a stub transformer, conditional and unconditional in turn. "
    "changes[t] are mean|x_t − x_(t−1)| and mean|x_(t−1)| of the conditional latents x; output_changes[t] are "
    "mean|v_t − v_s|, mean|v_s| and mean|v_t| of the output at an evaluation and at the evaluation s before, null "
    "elsewhere. `path` tells whether x moves on a line."
)
WARMUP = 5  # steps, as many as the repository's setting of ten calls


def record(checkout: Checkout) -> list[dict[str, Any]]:
    known = {"torch": torch, "amp": torch.cuda.amp, "sinusoidal_embedding_1d": lambda width, t: t.reshape(1, 1)}
    forward = checkout.definitions(FILE, DEFINITIONS, known).easycache_forward
    return [
        _run(forward, seed, threshold, path)
        for seed in range(3)
        for threshold in (0.05, 0.1, 0.2)
        for path in ("straight", "wandering")
    ]


def _run(forward: Any, seed: int, threshold: float, path: str) -> dict[str, Any]:  # noqa: ANN401  code of others
    block, step = Counted(seed), 0
    model = SimpleNamespace(
        model_type="t2v", patch_embedding=_Identity(), freqs=torch.zeros(1), freq_dim=2, dim=WIDTH, text_len=1,
        time_embedding=lambda e: e, time_projection=lambda e: e.repeat(1, 6 * WIDTH), text_embedding=lambda text: text,
        blocks=[lambda x, **_: x + block(x)], head=lambda x, e: (1 + 0.01 * step) * x,
        unpatchify=lambda x, sizes: [x[0].T.reshape(WIDTH, TOKENS, 1, 1)],
        cnt=0, num_steps=2 * STEPS, ret_steps=2 * WARMUP, cutoff_steps=2 * STEPS - 2, thresh=threshold, k=None,
    )  # fmt: skip
    making = straight if path == "straight" else wandering
    inputs = making(seed, stride=0.1, shape=(WIDTH, TOKENS, 1, 1))
    evaluated, changes = [], []
    output_changes: list[list[float] | None] = []
    kept: Tensor | None = None
    for step, latents in enumerate(inputs):  # the stub's head reads the step
        before = block.runs
        for branch in range(2):
            with torch.no_grad():
                output = forward(model, [latents], torch.tensor([1.0]), [torch.zeros(1, WIDTH)], TOKENS)[0]
            if branch == 0:
                conditional = output
        changes.append(l1_change(latents, inputs[max(step - 1, 0)]))
        ran = block.runs > before
        output_changes.append(
            [*l1_change(conditional, kept), float(conditional.abs().mean())] if ran and kept is not None else None
        )
        if ran:
            evaluated.append(step)
            kept = conditional
    settings = {"steps": STEPS, "threshold": threshold, "warmup": WARMUP, "path": path}
    return {"settings": settings, "changes": changes, "output_changes": output_changes, "evaluated": evaluated}


class _Identity:
    weight = torch.zeros(1)

    def __call__(self, latents: Tensor) -> Tensor:
        return latents
