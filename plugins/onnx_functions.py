"""The validity-and-blend op as ONNX model-local functions, which service parts call.

Each function is a node of domain "adacorr" whose body is written in standard ops, so that one file serves every
backend: ONNX Runtime and TensorRT for RTX run the body; TensorRT takes a plugin of that name where one is registered
(that is what the node's attribute `plugin_namespace` asks for) and the body otherwise. The bodies are in ONNX's own
text syntax, which reads like the formulas.

What decided the bodies: ONNX Runtime on the CPU fuses no element-wise ops, and Split, Slice and Gather copy, so a form
costs what it moves. Minima of 20 to 60 interleaved runs in ms (Einsum: 12), 2 threads on cores shared with a training
job, put together from several series: trust the order, not the last 20 %.

    predict, T = 2, U = 2                   R16 N256 D384   R32 N49 D128   T = 3 (R16 N256 D384)
    Mul, MatMul by ones, Add  (chosen)          6.3             0.50           9.8
    Mul, Gemm onto tokens                       6.9             0.52          10.3
    Mul and Add chain after one Split           6.6             0.71          15.3
    Mul and Add chain, an input per unit        7.7             0.58          12.0
    Mul, ReduceSum, Add                         8.1             0.79          11.4
    Mul, Split, Sum                             8.1             0.81          17.0
    Einsum                                       93             3.4             –
    Scan over rows, units as inputs             5.0             0.46           7.3   (no form for a GPU: not taken)
    signals
    sums of squares, E[x²] − E[x]²  (chosen)    2.8             0.41
    the same, means by MatMul                   3.1             0.46
    LayerNormalization's statistics             4.9             0.45
    deviations from the mean (two passes)       6.7             0.51
"""

from __future__ import annotations

from typing import Final

import onnx
from onnx import parser

from adacorr_deploy.core.specs import ModelSpec
from adacorr_deploy.plugins.oracle import gate_rows

DOMAIN: Final = "adacorr"
OPSET: Final = 20
FLOAT32_MAX: Final = "3.4028234e38"

_FUNCTION_HEAD: Final = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'


def signals_function(model: ModelSpec) -> onnx.FunctionProto:
    """Return AdaCorrSignals <epsilon, rank>; `rank` says which largest ratio is the 95th percentile of the tokens.

    Where the number of tokens varies, there is no such attribute, and the rank is computed.

    All arithmetic is float32. A token's variance is E[x²] − E[x]²: it needs no second pass, and is exact enough unless
    a token's deviation is below a thousandth of its magnitude. Where sums of squares overflow, the ratio could come out
    as a harmless looking x/inf = 0, so the offset is then set to inf.
    """
    attributes = "epsilon" if model.latents.varying else "epsilon, rank, plugin_namespace"
    return parser.parse_function(f"""{_FUNCTION_HEAD}
        AdaCorrSignals <{attributes}> (tokens, reference) => (signals) {{
            channels = Constant <value_ints = [2]> ()
            image = Constant <value_ints = [1]> ()
            width = Constant <value_float = {float(model.width)}> ()
            epsilon = Constant <value_float : float = @epsilon> ()
            {_rank_lines(model)}
            x = Cast <to = 1> (tokens)
            x_ref = Cast <to = 1> (reference)

            difference = Sub (x, x_ref)
            distance_2 = ReduceSumSquare (difference, channels)
            energy = ReduceSumSquare (x, channels)
            energy_ref = ReduceSumSquare (x_ref, channels)
            distance = Sqrt (distance_2)
            norm_ref = Sqrt (energy_ref)
            scale = Add (norm_ref, epsilon)
            ratio_3d = Div (distance, scale)
            ratio = Squeeze (ratio_3d, channels)
            ratio_2 = Mul (ratio, ratio)
            mean_ratio_2 = ReduceMean (ratio_2, image)
            offset = Sqrt (mean_ratio_2)
            all_energy = Add (energy, energy_ref)
            mean_energy_3d = ReduceMean (all_energy, image)
            mean_energy = Squeeze (mean_energy_3d, channels)
            largest_float = Constant <value_float = {FLOAT32_MAX}> ()
            is_finite = LessOrEqual (mean_energy, largest_float)
            infinity = Mul (largest_float, largest_float)
            relative_offset = Where (is_finite, offset, infinity)

            largest_ratios, _indices = TopK (ratio, rank)
            relative_offset_p95 = ReduceMin (largest_ratios, image)

            mean = ReduceMean (x, channels)
            mean_ref = ReduceMean (x_ref, channels)
            mean_2 = Mul (mean, mean)
            mean_ref_2 = Mul (mean_ref, mean_ref)
            power = Div (energy, width)
            power_ref = Div (energy_ref, width)
            rounded_variance = Sub (power, mean_2)
            rounded_variance_ref = Sub (power_ref, mean_ref_2)
            variance = Relu (rounded_variance)
            variance_ref = Relu (rounded_variance_ref)
            deviation = Sqrt (variance)
            deviation_ref = Sqrt (variance_ref)
            spread_3d = ReduceMean (deviation, image)
            spread_ref_3d = ReduceMean (deviation_ref, image)
            paper_spatial = Squeeze (spread_3d, channels)
            spread_ref = Squeeze (spread_ref_3d, channels)
            spread_change = Sub (paper_spatial, spread_ref)
            size_of_change = Abs (spread_change)
            spread_scale = Add (spread_ref, epsilon)
            spatial_change = Div (size_of_change, spread_scale)

            mean_distance_3d = ReduceMean (distance, image)
            paper_temporal = Squeeze (mean_distance_3d, channels)

            change_of_token = ReduceL1 (difference, channels)
            size_of_token = ReduceL1 (x_ref, channels)
            per_channel_ref = Div (size_of_token, width)
            per_channel = Div (change_of_token, width)
            power_of_change = Div (distance_2, width)
            change_l1_3d = ReduceMean (per_channel, image)
            reference_l1_3d = ReduceMean (per_channel_ref, image)
            change_square_3d = ReduceMean (power_of_change, image)
            reference_square_3d = ReduceMean (power_ref, image)
            change_l1 = Squeeze (change_l1_3d, channels)
            reference_l1 = Squeeze (reference_l1_3d, channels)
            change_square = Squeeze (change_square_3d, channels)
            reference_square = Squeeze (reference_square_3d, channels)
            signals = Concat <axis = 1> (
                relative_offset, relative_offset_p95, spatial_change, paper_temporal, paper_spatial,
                change_l1, reference_l1, change_square, reference_square)
        }}""")


def _rank_lines(model: ModelSpec) -> str:
    """Return the lines that give `rank` (1,) int64, as `oracle.p95_rank` does: N − (95·N + 99) ÷ 100 + 1."""
    if not model.latents.varying:
        return "rank = Constant <value_ints : ints = @rank> ()"
    return """
            count = Shape <start = 1, end = 2> (tokens)
            ninety_five = Constant <value_ints = [95]> ()
            ninety_nine = Constant <value_ints = [99]> ()
            hundred = Constant <value_ints = [100]> ()
            one_rank = Constant <value_ints = [1]> ()
            hundredths = Mul (count, ninety_five)
            rounded_up = Add (hundredths, ninety_nine)
            below = Div (rounded_up, hundred)
            above_95 = Sub (count, below)
            rank = Add (above_95, one_rank)"""


def predict_function(model: ModelSpec, *, units: int, evaluations: int) -> onnx.FunctionProto:
    """Return AdaCorrPredict for one (T, U, N, D): tokens + Σₜ Σᵤ (cₜ·gateᵤ) ⊙ history[t, u]."""
    return parser.parse_function(f"""{_FUNCTION_HEAD}
        AdaCorrPredict {_plugin_attribute(model)}
        (tokens, history, modulation, gate_steps, coefficients) => (tokens_out) {{
            {_update_lines(model, units, evaluations)}
            tokens_out = Add (tokens, update)
        }}""")


def blend_function(model: ModelSpec, *, units: int, evaluations: int) -> onnx.FunctionProto:
    """Return AdaCorrBlend: (1 − w)·(base + ΣΣ) + w·fresh, and the weights w of the rows.

    Where w is exactly 0 or 1 the other side is not mixed in, since 0·NaN is NaN. An estimate that is not finite, and
    thresholds that give none (0/0), mean w = 1.
    """
    return parser.parse_function(f"""{_FUNCTION_HEAD}
        AdaCorrBlend {_plugin_attribute(model)}
        (base, history, modulation, gate_steps, coefficients, fresh, estimate, thresholds) => (tokens_out, weight) {{
            {_update_lines(model, units, evaluations)}
            cached = Add (base, update)

            zero = Constant <value_float = 0.0> ()
            one = Constant <value_float = 1.0> ()
            reuse_at, recompute_at, gain = Split <axis = 0, num_outputs = 3> (thresholds)
            above = Sub (estimate, reuse_at)
            range = Sub (recompute_at, reuse_at)
            scaled = Mul (gain, above)
            raw = Div (scaled, range)
            size = Abs (estimate)
            largest_float = Constant <value_float = {FLOAT32_MAX}> ()
            is_finite = LessOrEqual (size, largest_float)
            is_below_one = Less (raw, one)
            is_partial = And (is_finite, is_below_one)
            positive = Max (raw, zero)
            weight = Where (is_partial, positive, one)

            row_axes = Constant <value_ints = [1, 2]> ()
            weight_3d = Unsqueeze (weight, row_axes)
            share = CastLike (weight_3d, base)
            rest_float = Sub (one, weight_3d)
            rest = CastLike (rest_float, base)
            kept = Mul (rest, cached)
            taken = Mul (share, fresh)
            mixed = Add (kept, taken)
            is_mixed = Less (weight_3d, one)
            is_touched = Greater (weight_3d, zero)
            mixed_or_fresh = Where (is_mixed, mixed, fresh)
            tokens_out = Where (is_touched, mixed_or_fresh, cached)
        }}""")


def _update_lines(model: ModelSpec, units: int, evaluations: int) -> str:
    """Return the lines that compute `update` (R, N, D), the weighted sum over a slot's history.

    c·g is multiplied out in float32 on the small (T, U, R, 1, D) gates; the sum over T·U is a matrix product with ones.
    """
    count = evaluations * units
    rows = ", ".join(map(str, gate_rows(units)))
    return f"""
            gate_rows = Constant <value_ints = [{rows}]> ()
            modulation_then = Gather <axis = 0> (modulation, gate_steps)
            gates_p = Gather <axis = 2> (modulation_then, gate_rows)
            gates = Cast <to = 1> (gates_p)
            per_evaluation = Constant <value_ints = [{evaluations}, 1, 1, 1]> ()
            coefficients_4d = Reshape (coefficients, per_evaluation)
            weights_float = Mul (gates, coefficients_4d)
            weights_trud = CastLike (weights_float, history)
            weights_turd = Transpose <perm = [0, 2, 1, 3]> (weights_trud)
            token_axis = Constant <value_ints = [3]> ()
            weights = Unsqueeze (weights_turd, token_axis)
            weighted = Mul (history, weights)
            flat = Constant <value_ints = [{count}, -1]> ()
            weighted_2d = Reshape (weighted, flat)
            ones_float = Constant <value_floats = [{", ".join(["1.0"] * count)}]> ()
            ones_1d = CastLike (ones_float, history)
            one_row = Constant <value_ints = [1, {count}]> ()
            ones = Reshape (ones_1d, one_row)
            update_2d = MatMul (ones, weighted_2d)
            {_row_shape_line(model)}
            update = Reshape (update_2d, rows_of_tokens)"""


def _plugin_attribute(model: ModelSpec) -> str:
    """Return a function's attribute that lets a plugin take its place; plugins are for a fixed number of tokens."""
    return "" if model.latents.varying else "<plugin_namespace>"


def _row_shape_line(model: ModelSpec) -> str:
    if model.latents.varying:
        return "rows_of_tokens = Shape <start = 2> (history)"
    return f"rows_of_tokens = Constant <value_ints = [-1, {model.tokens}, {model.width}]> ()"
