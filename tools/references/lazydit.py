"""LazyDiT: its block with gates of random weights, on one image."""

from __future__ import annotations

from typing import Any

import torch
from checkout import Checkout
from torch import nn
from trajectories import STEPS, TOKENS, WIDTH, Counted, wandering

REPOSITORY = "shawnricecake/lazydit"
FILE = "lazydit/models/models_lazy_learning_imagenet.py"
DEFINITIONS = ("STE", "modulate", "DiTBlock")
HOW = (
    "DiTBlock, with units that count how often they run, is accelerated with gates of random weights. "
    "modulated[unit][t] is the mean over tokens of the unit's modulated input and weights[unit][t] its gate of that "
    "step, so that the gate's sum is tokens · weights · modulated; the unit is reused where its sigmoid is below ½."
)
UNITS = ("attn", "mlp")


class Unit(Counted):
    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(0)


def record(checkout: Checkout) -> list[dict[str, Any]]:
    block = checkout.definitions(FILE, DEFINITIONS, {"torch": torch, "nn": nn, "Attention": Unit, "Mlp": Unit}).DiTBlock
    return [_run(block, seed, per_step) for seed in range(3) for per_step in (False, True)]


def _run(block_class: Any, seed: int, per_step: bool) -> dict[str, Any]:  # noqa: ANN401  code of others
    torch.manual_seed(seed)
    block = block_class(WIDTH, 1)
    timesteps = list(range(STEPS))
    block.create_lazy_learning(STEPS, timesteps)
    gates: dict[str, list[nn.Linear]] = {"attn": list(block.attn_lazy_learning), "mlp": list(block.mlp_lazy_learning)}
    modulated: dict[str, list[list[float]]] = {unit: [[0.0] * WIDTH] for unit in UNITS}  # the first step asks no gate
    for unit, each in gates.items():
        for gate in each:
            gate.weight.data = torch.randn(1, WIDTH) if per_step else each[0].weight.data
            gate.register_forward_hook(
                lambda _m, given, _o, at=modulated[unit]: at.append(given[0].double().mean(dim=(0, 1)).tolist())
            )
    evaluated: dict[str, list[int]] = {unit: [] for unit in UNITS}
    for step, tokens in enumerate(wandering(seed, stride=1.0)):
        before = {unit: getattr(block, unit).runs for unit in UNITS}
        with torch.no_grad():
            block(tokens, torch.full((1, WIDTH), 0.1 * step), accelerate=True, timestep=step)
        for unit in UNITS:
            evaluated[unit] += [step] * (getattr(block, unit).runs > before[unit])
    weights = {unit: [gate.weight[0].tolist() for gate in each] for unit, each in gates.items()}
    settings = {"steps": STEPS, "tokens": TOKENS, "threshold": 0.5, "gate_per_step": per_step}
    return {"settings": settings, "modulated": modulated, "weights": weights, "evaluated": evaluated}
