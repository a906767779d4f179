"""Learning-to-Cache: its DiT with a router file, small enough to be run at once."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from checkout import Checkout, imported_as, stand_in
from torch import Tensor, nn
from trajectories import Counted

REPOSITORY = "horseee/learning-to-cache"
FILE = "DiT/models/dynamic_models.py"
DEFINITIONS = ("DiT",)
ROUTERS = "DiT/models/router_models.py"
HOW = (
    f"DiT of three blocks, with units that count how often they run, loads a file of random routers ({ROUTERS}) and is "
    "run over all steps. scores[i] are sigmoids of router i, attention and MLP of each block in turn; router i belongs "
    "to step S − 1 − i. evaluated[t] are the halves that ran."
)
STEPS, DEPTH = 20, 3


class PatchEmbed(nn.Module):
    """Four pixels become four tokens of eight channels."""

    num_patches = 4
    patch_size = (1, 1)

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, 8, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Unit(Counted):
    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(0)


def record(checkout: Checkout) -> list[dict[str, Any]]:
    units = stand_in("timm.models.vision_transformer", PatchEmbed=PatchEmbed, Attention=Unit, Mlp=Unit)
    timm = {"timm": stand_in("timm"), "timm.models": stand_in("timm.models"), units.__name__: units}
    routers = checkout.module(ROUTERS, "models.router_models", timm)
    with imported_as({"models": stand_in("models"), "models.router_models": routers}):
        dit = checkout.module(FILE, "dynamic_models", timm).DiT
        return [_run(dit, routers.Router, seed, threshold) for seed in range(3) for threshold in (0.1, 0.5)]


def _run(dit: Any, router: Any, seed: int, threshold: float) -> dict[str, Any]:  # noqa: ANN401  code of others
    torch.manual_seed(seed)
    routers = [router(2 * DEPTH) for _ in range(STEPS)]
    for each in routers:
        each.prob.data *= 3  # on both sides of either threshold
    model = dit(input_size=2, patch_size=1, in_channels=1, hidden_size=8, depth=DEPTH, num_heads=1, num_classes=4)
    timesteps = list(range(0, 1000, 1000 // STEPS))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "routers.pt")
        torch.save({"routers": nn.ModuleList(routers).state_dict()}, path)
        model.load_ranking(path, STEPS, timesteps, threshold)
    model.eval().reset(STEPS)
    halves = [unit for block in model.blocks for unit in (block.attn, block.mlp)]
    evaluated = []
    for timestep in reversed(timesteps):
        before = [half.runs for half in halves]
        with torch.no_grad():
            model(torch.randn(1, 1, 2, 2), torch.tensor([timestep]), torch.tensor([1]))
        evaluated.append([index for index, half in enumerate(halves) if half.runs > before[index]])
    scores = [each().tolist() for each in routers]
    return {"settings": {"steps": STEPS, "threshold": threshold}, "scores": scores, "evaluated": evaluated}
