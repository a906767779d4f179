"""The validity-and-blend op in NumPy: the oracle of every other form of it (ONNX function, CUDA kernel).

All sums are taken in float64 and only results are rounded, so that a difference is the other form's error. Where
float32 overflows, the other forms give inf or NaN and this one may give a large number; both make a block recompute.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.specs import GATE_ROW, MODULATIONS_PER_UNIT, SCALE_ROW, SHIFT_ROW

EPSILON: Final = 1e-6  # keeps a token or an image that is all zeros from dividing by zero
NORM_EPSILON: Final = 1e-6  # of the norms that adaLN modulates, in every family here

Floats = NDArray[np.floating]


def p95_rank(tokens: int) -> int:
    """Return which largest of N values is their 95th percentile by nearest rank: N − ceil(0.95·N) + 1."""
    return tokens - -(-95 * tokens // 100) + 1  # in integers, since 0.95·N may round up past a whole number


def signals(tokens: Floats, reference: Floats) -> NDArray[np.float32]:
    """Return how far a block's input is from the one that its slot was filled with.

    Args:
        tokens: Block input now, (R, N, D), float16 or float32.
        reference: Block input when the slot was filled; same shape and dtype.

    Returns:
        (R, 9): relative_offset, relative_offset_p95, spatial_change, paper_temporal, paper_spatial, change_l1,
        reference_l1, change_square, reference_square, as in `caching.decisions.Signals`. The deviation over channels is
        the population's (divided by D).
    """
    with np.errstate(all="ignore"):  # NaN and inf are answers here
        x, x_ref = tokens.astype(np.float64), reference.astype(np.float64)
        distance = np.linalg.norm(x - x_ref, axis=2)
        ratio = distance / (np.linalg.norm(x_ref, axis=2) + EPSILON)
        ranked = np.sort(ratio, axis=1)[:, ::-1]
        spread, spread_ref = x.std(axis=2).mean(axis=1), x_ref.std(axis=2).mean(axis=1)
        columns = (
            np.sqrt(np.mean(ratio**2, axis=1)),
            ranked[:, p95_rank(tokens.shape[1]) - 1],
            np.abs(spread - spread_ref) / (spread_ref + EPSILON),
            distance.mean(axis=1),
            spread,
            np.abs(x - x_ref).mean(axis=(1, 2)),
            np.abs(x_ref).mean(axis=(1, 2)),
            np.square(x - x_ref).mean(axis=(1, 2)),
            np.square(x_ref).mean(axis=(1, 2)),
        )
        return np.stack(columns, axis=1).astype(np.float32)


def predict(
    tokens: Floats, history: Floats, modulation: Floats, gate_steps: NDArray[np.int64], coefficients: Floats
) -> Floats:
    """Return what a slot says a block would give: tokens + Σₜ Σᵤ cₜ·gateᵤ[gate_stepsₜ] ⊙ history[t, u].

    Args:
        tokens: Block input, (R, N, D), float16 or float32: also the dtype of the result.
        history: Results of the units before their gates, (T, U, R, N, D), units in block order.
        modulation: (S, R, 3U, D): for each unit shift, scale, gate.
        gate_steps: (T,): the row of `modulation` whose gates weigh each evaluation.
        coefficients: (T,).
    """
    with np.errstate(all="ignore"):
        estimate = tokens.astype(np.float64)
        for evaluation, (step, coefficient) in enumerate(zip(gate_steps, coefficients, strict=True)):
            for unit, row in enumerate(gate_rows(history.shape[1])):
                gate = modulation[step, :, row, None, :].astype(np.float64)
                estimate = estimate + float(coefficient) * gate * history[evaluation, unit]
        return estimate.astype(tokens.dtype)


def gate_rows(units: int) -> list[int]:
    """Return the rows of a part's modulation that hold gates, one per unit, in order."""
    return [MODULATIONS_PER_UNIT * unit + GATE_ROW for unit in range(units)]


def combine(base: Floats, history: Floats, coefficients: Floats, scale: Floats, shift: Floats) -> Floats:
    """Return what a span's last residuals say it would give: base + scale ⊙ Σₜ cₜ·historyₜ + shift.

    Args:
        base: The span's input, (R, N, D), float16 or float32: also the dtype of the result.
        history: What the span added to its input at its last T evaluations, (T, 1, R, N, D).
        coefficients: (T,).
        scale: Of each channel, (D,).
        shift: Of each channel, (D,).
    """
    with np.errstate(all="ignore"):
        weights = coefficients.astype(np.float64)[:, None] * scale.astype(np.float64)
        summed: NDArray[np.float64] = np.einsum("td,turnd->rnd", weights, history.astype(np.float64))
        return np.asarray(base.astype(np.float64) + summed + shift).astype(base.dtype)


def modulated(tokens: Floats, modulation: Floats, step: NDArray[np.int64]) -> Floats:
    """Return what a block part's first unit computes on: LayerNorm(tokens) ⊙ (1 + scale) + shift.

    Args:
        tokens: Block input, (R, N, D), float16 or float32: also the dtype of the result.
        modulation: (S, R, 3U, D): for each unit shift, scale, gate.
        step: (1,): the row of `modulation`.
    """
    return _modulated(tokens, modulation, step).astype(tokens.dtype)


def probe(
    tokens: Floats, modulation: Floats, step: NDArray[np.int64], weights: Floats, bias: Floats
) -> NDArray[np.float32]:
    """Return weights · mean over tokens of `modulated` + bias, (R,): LazyDiT's signal (arXiv 2412.12444).

    Args:
        tokens: As in `modulated`.
        modulation: As in `modulated`.
        step: As in `modulated`.
        weights: Of each channel, (D,).
        bias: (1,).
    """
    with np.errstate(all="ignore"):
        means = _modulated(tokens, modulation, step).mean(axis=1)
        return np.asarray(means @ weights.astype(np.float64) + bias, dtype=np.float32)


def _modulated(tokens: Floats, modulation: Floats, step: NDArray[np.int64]) -> NDArray[np.float64]:
    rows = modulation[int(step[0])].astype(np.float64)
    shift, scale = rows[:, SHIFT_ROW, None, :], rows[:, SCALE_ROW, None, :]
    with np.errstate(all="ignore"):
        x = tokens.astype(np.float64)
        normed = (x - x.mean(axis=2, keepdims=True)) / np.sqrt(x.var(axis=2, keepdims=True) + NORM_EPSILON)
        return np.asarray(normed * (1 + scale) + shift)


def blend_weight(estimate: NDArray[np.float32], thresholds: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the share of the fresh output: clip(γ·(ê − τ_reuse)/(τ_recompute − τ_reuse), 0, 1), and 1 if unknown.

    Args:
        estimate: Estimated relative error of reuse, (R,).
        thresholds: (3,): τ_reuse, τ_recompute, γ.
    """
    reuse, recompute, gain = (float(value) for value in thresholds)
    with np.errstate(all="ignore"):
        raw = gain * (estimate.astype(np.float64) - reuse) / np.float64(recompute - reuse)
        known = np.isfinite(estimate) & ~np.isnan(raw)
        return np.where(known, np.clip(raw, 0.0, 1.0), 1.0).astype(np.float32)


def blend(
    base: Floats,
    history: Floats,
    modulation: Floats,
    gate_steps: NDArray[np.int64],
    coefficients: Floats,
    fresh: Floats,
    estimate: NDArray[np.float32],
    thresholds: NDArray[np.float32],
) -> tuple[Floats, NDArray[np.float32]]:
    """Return ((1 − w)·cached + w·fresh, w) for cached = `predict(base, …)`; the tensors are those of the blend part.

    Where w is 0 or 1 the other side is not read, so that a NaN in a slot can't survive its recomputation.
    """
    weight = blend_weight(estimate, thresholds)
    cached = predict(base, history, modulation, gate_steps, coefficients)
    share = weight[:, None, None].astype(np.float64)
    with np.errstate(all="ignore"):
        mixed = (1.0 - share) * cached + share * fresh
    mixed = np.where(share <= 0.0, cached, np.where(share >= 1.0, fresh, mixed))
    return mixed.astype(base.dtype), weight


def extrapolate(
    latents: Floats,
    history: Floats,
    factors: NDArray[np.float32],
    sampler_row: NDArray[np.float32],
    noise: Floats,
    carried: Floats,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return the next latents, the predicted model output and what the next step is given, as large as the latents.

    Args:
        latents: (B, C, H, W), or (B, C, F, H, W) of clips, as all that follow.
        history: The model's last outputs, (T, 1, B, C, …).
        factors: (T,), their weights.
        sampler_row: (8,), the step's row of the sampler's table.
        noise: Standard normals.
        carried: From the step before.
    """
    output = np.einsum("t,tub...->b...", factors.astype(np.float64), history.astype(np.float64))
    of = dict(zip(COLUMNS, sampler_row.astype(np.float64).tolist(), strict=True))
    wide = latents.astype(np.float64)
    mean = of["latents"] * wide + of["output"] * output + of["carried"] * carried
    carried_out = of["carried_of_latents"] * wide + of["carried_of_output"] * output
    return (mean + of["noise"] * noise).astype(np.float32), output.astype(np.float32), carried_out.astype(np.float32)


def output_error(predicted: Floats, fresh: Floats) -> NDArray[np.float32]:
    """Return ‖predicted − fresh‖ / (‖fresh‖ + ε) per image, (B,)."""
    wide = fresh.astype(np.float64).reshape(len(fresh), -1)
    difference = predicted.astype(np.float64).reshape(len(fresh), -1) - wide
    error = np.linalg.norm(difference, axis=1) / (np.linalg.norm(wide, axis=1) + EPSILON)
    return np.asarray(error, dtype=np.float32)


def motion(frames: Floats) -> NDArray[np.float32]:
    """Return ‖r[1:] − r[:−1]‖₁ / (‖r[1:]‖₁ + ‖r[:−1]‖₁ + ε) between frames, 0 … 1, per row.

    Args:
        frames: r, (R, F, numbers of a frame).
    """
    wide = frames.astype(np.float64)
    later, earlier = wide[:, 1:], wide[:, :-1]
    change, both = np.abs(later - earlier).sum(axis=(1, 2)), (np.abs(later) + np.abs(earlier)).sum(axis=(1, 2))
    return np.asarray(change / (both + EPSILON), dtype=np.float32)


def philox_normals(seed: int, image: int, draw: int, count: int) -> NDArray[np.float32]:
    """Return standard normals, (count,), that depend on their place alone: image, draw and index.

    They are Box and Muller's of the sequence that NumPy's `np.random.Philox(key=[seed, image])` gives, 53 bits of each
    word: a GPU makes the same ones, in any order. A draw takes whole counters of four words.

    Args:
        seed: Of the request, 0 … 2⁶⁴ − 1.
        image: Its number in the batch.
        draw: How many draws of `count` numbers came before.
        count: How many numbers.
    """
    counters = -(-count // 4)
    generator = np.random.Philox(key=np.array([seed, image], np.uint64), counter=draw * counters)
    uniform = ((generator.random_raw(4 * counters) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # (0, 1]
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * np.pi * uniform[1::2]
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normals.reshape(-1)[:count].astype(np.float32)
