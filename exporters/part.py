"""A part of a model as PyTorch sees it: its contract, its modules, and which other parts share its graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adacorr_deploy.core.specs import PartSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part, made of the model's own submodules (nothing is copied).

    `module` takes the tensors of `spec.inputs` by name and returns those of `spec.outputs` in order. It computes in the
    precision of its weights. Parts of one `structure` differ in the values of their weights alone, so they are traced
    once for all.
    """

    spec: PartSpec
    module: nn.Module
    structure: str
