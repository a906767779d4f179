"""Attention in the form that compiles best: joined projections, and no library-specific op.

The joined weights depend on weights alone, so the exporter stores them joined. The scores stay decomposed because
TensorRT for RTX has no float32 kernel for ONNX's own Attention op; scale, product, bias, softmax, product is the
sequence that it fuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers.models.attention_processor import Attention
    from torch import nn


def fused_self_attention(attention: Attention, x: Tensor) -> Tensor:
    """Return what diffusers' `Attention` returns for plain self-attention, (R, N, D)."""
    query, key, value = _projected((attention.to_q, attention.to_k, attention.to_v), x, attention.heads)
    return _mixed(attention, query, key, value)


def fused_cross_attention(attention: Attention, x: Tensor, context: Tensor, context_bias: Tensor) -> Tensor:
    """Return what diffusers' `Attention` returns for tokens that look at a context, (R, N, D).

    Args:
        attention: diffusers' module.
        x: (R, N, D), the queries.
        context: (R, T, E), keys and values.
        context_bias: (R, T), added to the scores: 0 where the context is real, very negative where it is padding.
    """
    (query,) = _projected((attention.to_q,), x, attention.heads)
    key, value = _projected((attention.to_k, attention.to_v), context, attention.heads)
    return _mixed(attention, query, key, value, context_bias[:, None, None])


def _projected(projections: Sequence[nn.Linear], x: Tensor, heads: int) -> Sequence[Tensor]:
    """Return the projections of `x` (R, N, E) by head, (R, H, N, D/H) each, from one product."""
    weight = torch.cat([projection.weight for projection in projections])
    biases: list[Tensor | None] = [projection.bias for projection in projections]
    bias = torch.cat([each for each in biases if each is not None]) if biases[0] is not None else None
    head_width = weight.shape[0] // len(projections) // heads
    joined = functional.linear(x, weight, bias).reshape(-1, x.shape[1], len(projections), heads, head_width)
    return joined.permute(2, 0, 3, 1, 4).unbind()


def _mixed(attention: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the values as the queries weigh them, projected: (R, N, D) of (R, H, N, D/H)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    result: Tensor = attention.to_out[0](mixed)
    return result
