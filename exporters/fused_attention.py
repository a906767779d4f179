"""Self-attention in the form that compiles best: one product for query, key and value, and no library-specific op."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def fused_self_attention(attention: Attention, x: Tensor) -> Tensor:
    """Return what diffusers' `Attention` returns for plain self-attention, (R, N, D).

    Written for tracing: the joined weight depends on weights alone, so the exporter stores it joined. The scores stay
    decomposed because TensorRT for RTX has no float32 kernel for ONNX's own Attention op.
    """
    projections = (attention.to_q, attention.to_k, attention.to_v)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections]) if attention.to_q.bias is not None else None
    tokens, head_width = x.shape[1], weight.shape[0] // 3 // attention.heads
    joined = functional.linear(x, weight, bias).reshape(-1, tokens, 3, attention.heads, head_width)
    query, key, value = joined.permute(2, 0, 3, 1, 4)
    scores = (query * head_width**-0.5) @ key.transpose(-1, -2)
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(-1, tokens, attention.heads * head_width)
    result: Tensor = attention.to_out[0](mixed)
    return result
