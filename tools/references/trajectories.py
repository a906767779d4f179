"""Small inputs for published decision code, blocks that count how often they run, and what is measured of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

STEPS: Final = 30
TOKENS: Final = 6
WIDTH: Final = 8


def wandering(
    seed: int, *, stride: float, steps: int = STEPS, shape: Sequence[int] = (1, TOKENS, WIDTH)
) -> list[Tensor]:
    """Inputs that move by steps of uneven length in uneven directions."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(*shape, generator=generator)]
    for _ in range(steps - 1):
        length = stride * float(torch.rand((), generator=generator))
        inputs.append(inputs[-1] + length * torch.randn(*shape, generator=generator))
    return inputs


def straight(
    seed: int, *, stride: float, steps: int = STEPS, shape: Sequence[int] = (1, TOKENS, WIDTH)
) -> list[Tensor]:
    """Inputs on a line, at uneven distances: the way between two of them is as long as the steps between them."""
    generator = torch.Generator().manual_seed(seed)
    start, direction = (torch.randn(*shape, generator=generator) for _ in range(2))
    along = torch.cumsum(stride * torch.rand(steps, generator=generator), 0)
    return [start + float(length) * direction for length in along]


class Counted(nn.Module):
    """A bounded linear map, and how often it was run."""

    def __init__(self, seed: int, *, width: int = WIDTH) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.map.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
        self.runs = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.runs += 1
        return torch.tanh(self.map(tokens))


def l1_change(now: Tensor, before: Tensor) -> list[float]:
    """mean|now − before| and mean|before|: what our signals part measures."""
    return [float((now - before).abs().mean()), float(before.abs().mean())]


def l2_change(now: Tensor, before: Tensor) -> list[float]:
    """‖now − before‖² ÷ n and ‖before‖² ÷ n: what our signals part measures."""
    return [float((now - before).square().mean()), float(before.square().mean())]
