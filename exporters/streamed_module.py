"""A part as the reference of every comparison: in float32, with its weights in memory while it runs and no longer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adacorr_deploy.exporters.mapped_file import release_pages
from adacorr_deploy.exporters.tracing import weights_of


class StreamedModule(nn.Module):
    """Runs a part's module; of a model that runs part by part, memory holds one part's weights at a time."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the module's outputs, computed in float32 whatever its weights are stored in."""
        weights = {name: weight.float() for name, weight in weights_of(self.module).items()}
        outputs: tuple[Tensor, ...] = torch.func.functional_call(self.module, weights, (), inputs)
        release_pages()
        return outputs
