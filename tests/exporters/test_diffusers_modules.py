"""Invariant: the attention that is exported computes what diffusers' own attention computes, with any mask."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention

from adacorr_deploy.exporters.diffusers_modules import fused_cross_attention, fused_self_attention

MASKED = -10000.0  # what diffusers' models add to the scores of padding


def random_attention(*, bias: bool, context_width: int | None = None) -> Attention:
    torch.manual_seed(0)
    attention = Attention(query_dim=48, heads=3, dim_head=16, bias=bias, cross_attention_dim=context_width)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return attention.eval().requires_grad_(False)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_is_diffusers_own(bias: bool) -> None:
    attention, x = random_attention(bias=bias), torch.randn(2, 10, 48)
    assert relative_error(fused_self_attention(attention, x), attention(x)) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_is_diffusers_own_whatever_is_masked(bias: bool) -> None:
    attention = random_attention(bias=bias, context_width=32)
    x, context = torch.randn(4, 10, 48), 3 * torch.randn(4, 7, 32)
    real = torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None]  # of the last row, nothing at all
    context_bias = (~real) * MASKED
    expected = attention(x, encoder_hidden_states=context, attention_mask=context_bias[:, None])
    actual = fused_cross_attention(attention, x, context, context_bias)
    for row in range(3):
        assert relative_error(actual[row], expected[row]) < 1e-5
    # At −10000, float32 holds a score to a thousandth: both round, each in its own order.
    assert relative_error(actual[3], expected[3]) < 1e-2


def test_padding_never_reaches_the_result() -> None:
    attention = random_attention(bias=True, context_width=32)
    x, context = torch.randn(1, 10, 48), torch.randn(1, 7, 32)
    context_bias = torch.tensor([[0.0, 0.0, MASKED, MASKED, MASKED, MASKED, MASKED]])
    other = context.clone()
    other[:, 2:] = 50 * torch.randn(1, 5, 32)
    expected = fused_cross_attention(attention, x, context, context_bias)
    assert torch.equal(fused_cross_attention(attention, x, other, context_bias), expected)
    short = fused_cross_attention(attention, x, context[:, :2], context_bias[:, :2])
    assert relative_error(short, expected) < 1e-6
