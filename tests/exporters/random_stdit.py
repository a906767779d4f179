"""Small random STDiTs."""

from __future__ import annotations

import torch

from adacorr_deploy.exporters.stdit import STDiT, STDiTSize

SIZE = STDiTSize(width=48, heads=2, depth=2, patch=2, channels=4, out_channels=8, prompt_width=20, prompt_tokens=10)


def random_stdit(size: STDiTSize = SIZE) -> STDiT:
    """A model whose every weight matters: no gate, table or output is zero."""
    torch.manual_seed(0)
    model = STDiT(size)
    for name, weight in model.named_parameters():
        if name != "rope.freqs":
            torch.nn.init.normal_(weight, mean=float(name.endswith("_norm.weight")), std=0.15)
    return model.eval().requires_grad_(False)
