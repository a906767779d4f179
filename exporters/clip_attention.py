"""Self-attention within a clip: over the tokens of each frame, or over the frames of each place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SpatialAttention(nn.Module):
    """Attention among the tokens of a frame."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, frame_positions: Tensor) -> Tensor:
        """Return the result (R, F·S, D) of `x` (R, F·S, D) and the frames' positions (F,)."""
        frames = x.unflatten(1, (frame_positions.shape[0], -1)).flatten(0, 1)
        result: Tensor = self.attention(frames)
        return result.reshape(x.shape)


class TemporalAttention(nn.Module):
    """Attention among the frames at a place, rotated by their positions if `frequencies` are given, one per pair."""

    def __init__(self, attention: nn.Module, frequencies: Sequence[float] = ()) -> None:
        super().__init__()
        self.attention = attention
        self.frequencies = tuple(frequencies)  # no weight: angles are float32 in any precision

    def forward(self, x: Tensor, frame_positions: Tensor) -> Tensor:
        """Return the result (R, F·S, D) of `x` (R, F·S, D) and the frames' positions (F,) float32."""
        places = x.unflatten(1, (frame_positions.shape[0], -1)).transpose(1, 2)
        angles = [frame_positions[:, None] * torch.tensor(self.frequencies)] if self.frequencies else []
        result: Tensor = self.attention(places.flatten(0, 1), *angles)
        return result.reshape(places.shape).transpose(1, 2).flatten(1, 2)
