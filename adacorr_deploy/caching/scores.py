"""What policies compare, computed from signals: pure numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adacorr_deploy.caching.decisions import Signals

Thresholds = tuple[float, float, float]  # τ_reuse, τ_recompute, γ


def paper_score(signals: Signals, lambda_: float) -> float:
    """S = Δ_temp² + λ·Δ_spatial (METHOD §1)."""
    return signals.paper_temporal**2 + lambda_ * signals.paper_spatial


def robust_score(signals: Signals) -> float:
    """√Ŝ with Ŝ = Δ̂_t² + Δ̂_s² (METHOD §3); Δ̂_t is the larger of its RMS and half its 95th-percentile token."""
    return math.hypot(max(signals.relative_offset, 0.5 * signals.relative_offset_p95), signals.spatial_change)


def weight_from_estimate(estimate: float, thresholds: Thresholds) -> float:
    """W = clip(γ·(ê − τ_reuse) / (τ_recompute − τ_reuse), 0, 1), as the blend part computes it too.

    Args:
        estimate: ê, finite.
        thresholds: τ_reuse, τ_recompute, γ. Where the two meet, w is a step, and 1 on it.
    """
    reuse, recompute, gamma = thresholds
    if recompute <= reuse:
        return 1.0 if estimate >= reuse else 0.0
    return min(1.0, max(0.0, gamma * (estimate - reuse) / (recompute - reuse)))


def largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if any is: fused branches take one decision, from the worse of them."""
    worst = -math.inf
    for value in values:
        if math.isnan(value):
            return math.nan
        worst = max(worst, value)
    return worst
