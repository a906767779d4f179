"""The service parts as ONNX models: those that are one node of the op's functions, and those of a few plain ops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import onnx
from onnx import parser

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.specs import SCALE_ROW, SHIFT_ROW, DType, ModelSpec, PartSpec, TensorSpec
from adacorr_deploy.plugins.onnx_functions import (
    DOMAIN,
    OPSET,
    blend_function,
    predict_function,
    signals_function,
)
from adacorr_deploy.plugins.oracle import EPSILON, NORM_EPSILON, p95_rank
from adacorr_deploy.plugins.service_parts import (
    MAX_EVALUATIONS,
    blend_spec,
    combine_spec,
    extrapolate_spec,
    has_frames,
    modulated_spec,
    motion_spec,
    output_error_spec,
    predict_spec,
    probe_spec,
    signals_spec,
)
from adacorr_deploy.plugins.tensorrt_op import NAMESPACE

IR_VERSION: Final = 10
_ONNX_TYPES: Final[Mapping[DType, str]] = {
    DType.FLOAT32: "float",
    DType.FLOAT16: "float16",
    DType.BFLOAT16: "bfloat16",
    DType.INT64: "int64",
}


def service_parts(model: ModelSpec) -> dict[str, tuple[PartSpec, onnx.ModelProto]]:
    """Return each service part of a model by name: its spec and its ONNX model (opset 20, a few kB, no weights)."""
    parts = [signals_part(model)]
    for units in dict.fromkeys(model.units):
        for evaluations in range(1, MAX_EVALUATIONS + 1):
            parts.append(predict_part(model, units=units, evaluations=evaluations))
            parts.append(blend_part(model, units=units, evaluations=evaluations))
        parts += [modulated_part(model, units=units), probe_part(model, units=units)]
    parts += [combine_part(model, evaluations=count) for count in range(1, MAX_EVALUATIONS + 1)]
    parts += [extrapolate_part(model, evaluations=count) for count in range(1, MAX_EVALUATIONS + 1)]
    parts.append(output_error_part(model))
    if has_frames(model):
        parts.append(motion_part(model))
    return {spec.name: (spec, proto) for spec, proto in parts}


def signals_part(model: ModelSpec) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `signals` part: one memory-bound pass over a block's input and the slot's reference."""
    spec = signals_spec(model)
    function = signals_function(model)
    rank = {} if model.latents.varying else {"rank": f"[{p95_rank(model.tokens)}]"}
    return spec, _part_model(spec, function, {"epsilon": f"{EPSILON:f}", **rank}, model)


def predict_part(model: ModelSpec, *, units: int, evaluations: int) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `predict_{T}` part for block parts of `units`."""
    spec = predict_spec(model, units=units, evaluations=evaluations)
    return spec, _part_model(spec, predict_function(model, units=units, evaluations=evaluations), {}, model)


def blend_part(model: ModelSpec, *, units: int, evaluations: int) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `blend_{T}` part for block parts of `units`."""
    spec = blend_spec(model, units=units, evaluations=evaluations)
    return spec, _part_model(spec, blend_function(model, units=units, evaluations=evaluations), {}, model)


def combine_part(model: ModelSpec, *, evaluations: int) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `combine_{T}` part. A scale of 1, a shift of 0 and a coefficient of ±1 change no bit of a residual."""
    spec = combine_spec(model, evaluations=evaluations)
    return spec, _plain_model(
        spec,
        f"""
            per_evaluation = Constant <value_ints = [{evaluations}, 1, 1, 1, 1]> ()
            coefficients_5d = Reshape (coefficients, per_evaluation)
            weights_float = Mul (coefficients_5d, scale)
            weights = CastLike (weights_float, history)
            weighted = Mul (history, weights)
            {_summed_lines(evaluations)}
            moved = Add (base, update)
            shift_p = CastLike (shift, base)
            tokens_out = Add (moved, shift_p)""",
    )


def _summed_lines(evaluations: int) -> str:
    """Return the lines that sum `weighted` (T, 1, R, N, D) to `update` (R, N, D): a view of it, where T is 1."""
    if evaluations == 1:
        return """
            leading = Constant <value_ints = [0, 1]> ()
            update = Squeeze (weighted, leading)"""
    return """
            summed = Constant <value_ints = [0, 1]> ()
            update = ReduceSum <keepdims = 0> (weighted, summed)"""


def modulated_part(model: ModelSpec, *, units: int) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `modulated` part for block parts of `units`."""
    spec = modulated_spec(model, units=units)
    return spec, _plain_model(
        spec,
        f"""
            {_modulation_lines(model)}
            scaled = Mul (normed, factor)
            tokens_out = Add (scaled, shift)""",
    )


def probe_part(model: ModelSpec, *, units: int) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `probe` part for block parts of `units`; the mean over tokens is taken before the modulation."""
    spec = probe_spec(model, units=units)
    return spec, _plain_model(
        spec,
        f"""
            {_modulation_lines(model)}
            normed_float = Cast <to = 1> (normed)
            factor_float = Cast <to = 1> (factor)
            shift_float = Cast <to = 1> (shift)
            image = Constant <value_ints = [1]> ()
            mean = ReduceMean (normed_float, image)
            scaled = Mul (mean, factor_float)
            modulated = Add (scaled, shift_float)
            weighted = Mul (modulated, weights)
            summed = Constant <value_ints = [1, 2]> ()
            product = ReduceSum <keepdims = 0> (weighted, summed)
            probe = Add (product, bias)""",
    )


def _modulation_lines(model: ModelSpec) -> str:
    """Return the lines that compute `normed` (R, N, D), and `factor` and `shift` (R, 1, D), 1 + scale and shift."""
    return f"""
            width = Constant <value_ints = [{model.width}]> ()
            ones_float = ConstantOfShape <value = float[1] {{1.0}}> (width)
            ones = CastLike (ones_float, tokens)
            normed = LayerNormalization <axis = -1, epsilon = {NORM_EPSILON:f}> (tokens, ones)
            modulation_now = Gather <axis = 0> (modulation, step)
            leading = Constant <value_ints = [0]> ()
            rows_now = Squeeze (modulation_now, leading)
            shift_row = Constant <value_ints = [{SHIFT_ROW}]> ()
            scale_row = Constant <value_ints = [{SCALE_ROW}]> ()
            shift = Gather <axis = 1> (rows_now, shift_row)
            scale = Gather <axis = 1> (rows_now, scale_row)
            one_float = Constant <value_float = 1.0> ()
            one = CastLike (one_float, scale)
            factor = Add (scale, one)"""


def extrapolate_part(model: ModelSpec, *, evaluations: int) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `extrapolate_{T}` part. A few elements per image: plain ops, no function."""
    spec = extrapolate_spec(model, evaluations=evaluations)
    axes = len(model.latent_shape)
    return spec, _plain_model(
        spec,
        f"""
            per_evaluation = Constant <value_ints = [{", ".join([str(evaluations), *["1"] * (axes + 2)])}]> ()
            factor = Reshape (factors, per_evaluation)
            weighted = Mul (history, factor)
            summed = Constant <value_ints = [0, 1]> ()
            model_output = ReduceSum <keepdims = 0> (weighted, summed)
            row = Gather <axis = 0> (coefficients, step)
            image_axes = Constant <value_ints = [{", ".join(str(axis) for axis in range(2, axes + 1))}]> ()
            of_images = Unsqueeze (row, image_axes)
            {", ".join(f"of_{name}" for name in COLUMNS)} = Split <axis = 1, num_outputs = {len(COLUMNS)}> (of_images)
            kept = Mul (of_latents, latents)
            moved = Mul (of_output, model_output)
            mean = Add (kept, moved)
            corrected = Mul (of_carried, carried)
            multistep = Add (mean, corrected)
            shaken = Mul (of_noise, noise)
            latents_out = Add (multistep, shaken)
            carried_kept = Mul (of_carried_of_latents, latents)
            carried_moved = Mul (of_carried_of_output, model_output)
            carried_out = Add (carried_kept, carried_moved)""",
    )


def output_error_part(model: ModelSpec) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `output_error` part."""
    spec = output_error_spec(model)
    return spec, _plain_model(
        spec,
        f"""
            image = Constant <value_ints = [{", ".join(str(axis + 1) for axis in range(len(model.latent_shape)))}]> ()
            epsilon = Constant <value_float = {EPSILON:f}> ()
            difference = Sub (predicted, fresh)
            distance = ReduceL2 <keepdims = 0> (difference, image)
            norm = ReduceL2 <keepdims = 0> (fresh, image)
            scale = Add (norm, epsilon)
            error = Div (distance, scale)""",
    )


def motion_part(model: ModelSpec) -> tuple[PartSpec, onnx.ModelProto]:
    """Return the `motion` part, of a model of clips."""
    spec = motion_spec(model)
    return spec, _plain_model(
        spec,
        f"""
            first = Constant <value_ints = [0]> ()
            second = Constant <value_ints = [1]> ()
            last = Constant <value_ints = [-1]> ()
            end = Constant <value_ints = [2147483647]> ()
            of_row = Constant <value_ints = [1, 2]> ()
            epsilon = Constant <value_float = {EPSILON:f}> ()
            frame_count = Shape (frame_positions)
            by_frame = Concat <axis = 0> (first, frame_count, last)
            wide = Cast <to = 1> (tokens)
            frames = Reshape (wide, by_frame)
            later = Slice (frames, second, end, second)
            earlier = Slice (frames, first, last, second)
            difference = Sub (later, earlier)
            change = ReduceL1 <keepdims = 0> (difference, of_row)
            norm_later = ReduceL1 <keepdims = 0> (later, of_row)
            norm_earlier = ReduceL1 <keepdims = 0> (earlier, of_row)
            norms = Add (norm_later, norm_earlier)
            scale = Add (norms, epsilon)
            motion = Div (change, scale)""",
    )


def _plain_model(spec: PartSpec, body: str) -> onnx.ModelProto:
    return parser.parse_model(f"""
        <ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}], producer_name: "adacorr-deploy">
        {spec.name} ({_value_infos(spec.inputs)}) => ({_value_infos(spec.outputs)}) {{
            {body}
        }}""")


def _part_model(
    spec: PartSpec, function: onnx.FunctionProto, attributes: Mapping[str, str], model: ModelSpec
) -> onnx.ModelProto:
    """Return a model with one node: the function, called with the part's own tensor names."""
    values = [f"{name} = {value}" for name, value in attributes.items()]
    if not model.latents.varying:
        values.append(f'plugin_namespace = "{NAMESPACE}"')
    outputs = ", ".join(output.name for output in spec.outputs)
    inputs = ", ".join(tensor.name for tensor in spec.inputs)
    called = f"{DOMAIN}.{function.name} <{', '.join(values)}>" if values else f"{DOMAIN}.{function.name}"
    part = parser.parse_model(f"""
        <ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1], producer_name: "adacorr-deploy">
        {spec.name} ({_value_infos(spec.inputs)}) => ({_value_infos(spec.outputs)}) {{
            {outputs} = {called} ({inputs})
        }}""")
    part.functions.append(function)
    return part


def _value_infos(tensors: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{_ONNX_TYPES[t.dtype]}[{', '.join(map(str, t.shape))}] {t.name}" for t in tensors)
