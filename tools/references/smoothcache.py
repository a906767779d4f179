"""SmoothCache: its calibration helper makes the schedule, its caching helper obeys it, on a stub of DiT."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from checkout import Checkout
from torch import Tensor, nn
from trajectories import STEPS, Counted, wandering

REPOSITORY = "Roblox/SmoothCache"
FILE = "SmoothCache/calibration/calibration_helper.py"
DEFINITIONS = ("CalibrationHelper",)
HELPER = "SmoothCache/smooth_cache_helper.py"
HOW = (
    "CalibrationHelper watches an uncached run of a stub DiT and writes a schedule; SmoothCacheHelper "
    f"({HELPER}) then runs the stub by it. errors[kind][t][k−1] = ‖u_t − u_(t−k)‖₁ ÷ ‖u_t‖₁, mean over blocks, of "
    "what the calibrating run computed; null where t < k."
)
KINDS = ("attn", "mlp")


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn, self.mlp = Counted(2 * seed), Counted(2 * seed + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(tokens)
        return tokens + 1.5 * self.mlp(tokens)


def record(checkout: Checkout) -> list[dict[str, Any]]:
    calibrating = checkout.module(FILE, "calibration_helper").CalibrationHelper
    caching = checkout.module(HELPER, "smooth_cache_helper").SmoothCacheHelper
    return [
        _run(calibrating, caching, seed, alpha, lookahead)
        for seed in range(3)
        for alpha, lookahead in ((0.15, 3), (0.25, 3), (0.35, 6))
    ]


def _run(calibrating: Any, caching: Any, seed: int, alpha: float, lookahead: int) -> dict[str, Any]:  # noqa: ANN401
    blocks = [Block(depth) for depth in range(2)]
    model = nn.Module()
    model.blocks = nn.ModuleList(blocks)
    inputs = wandering(seed, stride=0.3)
    outputs: dict[str, list[list[Tensor]]] = {kind: [[] for _ in blocks] for kind in KINDS}
    for kind in KINDS:
        for depth, block in enumerate(blocks):
            unit: Counted = getattr(block, kind)
            unit.register_forward_hook(lambda _m, _i, output, at=outputs[kind][depth]: at.append(output.clone()))
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        helper = calibrating(
            model, Block, list(KINDS), calibration_lookahead=lookahead, calibration_threshold=alpha,
            schedule_length=STEPS, log_file=str(Path(folder, "schedule.json")),
        )  # fmt: skip
        helper.enable()
        _sample(blocks, inputs)
        schedule = helper.generate_schedule()
        helper.disable()
        errors = {kind: _errors(each, lookahead) for kind, each in outputs.items()}
        cached = caching(model, Block, list(KINDS), schedule)
        cached.enable()
        evaluated = _sample(blocks, inputs)
    settings = {"steps": STEPS, "alpha": alpha, "max_skipped": lookahead}
    return {"settings": settings, "errors": errors, "evaluated": evaluated}


def _sample(blocks: list[Block], inputs: list[Tensor]) -> dict[str, list[int]]:
    """Run the model, and return the steps at which the units of each kind really ran: all of a kind, or none."""
    evaluated: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for step, tokens in enumerate(inputs):
        before = {kind: [getattr(block, kind).runs for block in blocks] for kind in KINDS}
        for block in blocks:
            tokens = block(tokens)  # noqa: PLW2901
        for kind in KINDS:
            ran = {getattr(block, kind).runs > runs for block, runs in zip(blocks, before[kind], strict=True)}
            assert len(ran) == 1
            evaluated[kind] += [step] * ran.pop()
    return evaluated


def _errors(outputs: list[list[Tensor]], ages: int) -> list[list[float | None]]:
    def error(step: int, age: int) -> float | None:
        if age > step:
            return None
        each = [(unit[step] - unit[step - age]).abs().sum() / unit[step].abs().sum() for unit in outputs]
        return float(torch.stack(each).double().mean())

    return [[error(step, age) for age in range(1, ages + 1)] for step in range(STEPS)]
