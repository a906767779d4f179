"""Specs of the service parts: what the runtime launches between blocks. Plain values, no ONNX.

`signals` measures how far a block's input, or whatever else is observed of it (`modulated`, `probe`), is from what it
was at another step. `predict_{T}` stands for a block part from its last T evaluations, and `blend_{T}` mixes that
estimate with a fresh output. The most common number of units of a model's parts has the short names; any other is
called `predict_{T}_u{U}`. `combine_{T}` stands for a span of parts, from what it added to its input at its last T
evaluations. `extrapolate_{T}` stands for a whole step, from the model's last T outputs, and `output_error` says how
well it did. Of a model of clips, `motion` says how much what a span added differs between frames.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.shapes import BATCH, FRAMES, ROWS, STEPS, Dim
from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT, DType, ModelSpec, PartSpec, TensorSpec

MAX_EVALUATIONS: Final = 3  # T goes from 1 (hold) to 3 (second-order extrapolation)
SIGNALS_PART: Final = "signals"
OUTPUT_ERROR_PART: Final = "output_error"
MOTION_PART: Final = "motion"
SIGNAL_COUNT: Final = 9  # the measured fields of caching.decisions.Signals, in order


def common_unit_count(model: ModelSpec) -> int:
    """Return the number of units that most block parts of a model hold (the first met, if tied)."""
    return Counter(model.units).most_common(1)[0][0]


def predict_part_name(model: ModelSpec, *, units: int, evaluations: int) -> str:
    """Return the predict part for a block part of `units` and T = `evaluations`."""
    return _part_name(f"predict_{evaluations}", model, units)


def blend_part_name(model: ModelSpec, *, units: int, evaluations: int) -> str:
    """Return the blend part for a block part of `units` and T = `evaluations`."""
    return _part_name(f"blend_{evaluations}", model, units)


def modulated_part_name(model: ModelSpec, *, units: int) -> str:
    """Return the part that modulates the input of a block part of `units`."""
    return _part_name("modulated", model, units)


def probe_part_name(model: ModelSpec, *, units: int) -> str:
    """Return the part that probes the input of a block part of `units`."""
    return _part_name("probe", model, units)


def combine_part_name(evaluations: int) -> str:
    """Return the combine part for T = `evaluations`."""
    return f"combine_{evaluations}"


def extrapolate_part_name(evaluations: int) -> str:
    """Return the extrapolate part for T = `evaluations`."""
    return f"extrapolate_{evaluations}"


def _part_name(stem: str, model: ModelSpec, units: int) -> str:
    return stem if units == common_unit_count(model) else f"{stem}_u{units}"


def service_part_specs(model: ModelSpec) -> dict[str, PartSpec]:
    """Return the spec of each service part that a model's runtime may launch, by name."""
    specs = [signals_spec(model)]
    for units in dict.fromkeys(model.units):
        for evaluations in range(1, MAX_EVALUATIONS + 1):
            specs.append(predict_spec(model, units=units, evaluations=evaluations))
            specs.append(blend_spec(model, units=units, evaluations=evaluations))
        specs += [modulated_spec(model, units=units), probe_spec(model, units=units)]
    specs += [combine_spec(model, evaluations=count) for count in range(1, MAX_EVALUATIONS + 1)]
    specs += [extrapolate_spec(model, evaluations=count) for count in range(1, MAX_EVALUATIONS + 1)]
    specs.append(output_error_spec(model))
    if has_frames(model):
        specs.append(motion_spec(model))
    return {spec.name: spec for spec in specs}


def signals_spec(model: ModelSpec) -> PartSpec:
    """Return the spec of `signals`: tokens and reference (R, N, D) in, signals (R, 9) float32 out."""
    return PartSpec(
        name=SIGNALS_PART,
        inputs=(_tokens("tokens", model), _tokens("reference", model)),
        outputs=(TensorSpec(name="signals", dtype=DType.FLOAT32, shape=(ROWS, SIGNAL_COUNT)),),
    )


def predict_spec(model: ModelSpec, *, units: int, evaluations: int) -> PartSpec:
    """Return the spec of `predict_{T}`: tokens, the slot's history and its weights in, tokens_out (R, N, D) out."""
    return PartSpec(
        name=predict_part_name(model, units=units, evaluations=evaluations),
        inputs=(_tokens("tokens", model), *_history_inputs(model, units, evaluations)),
        outputs=(_tokens("tokens_out", model),),
    )


def blend_spec(model: ModelSpec, *, units: int, evaluations: int) -> PartSpec:
    """Return the spec of `blend_{T}`: as predict over `base`, with a fresh output, estimates and thresholds."""
    return PartSpec(
        name=blend_part_name(model, units=units, evaluations=evaluations),
        inputs=(
            _tokens("base", model),
            *_history_inputs(model, units, evaluations),
            _tokens("fresh", model),
            TensorSpec(name="estimate", dtype=DType.FLOAT32, shape=(ROWS,)),
            TensorSpec(name="thresholds", dtype=DType.FLOAT32, shape=(3,)),
        ),
        outputs=(_tokens("tokens_out", model), TensorSpec(name="weight", dtype=DType.FLOAT32, shape=(ROWS,))),
    )


def combine_spec(model: ModelSpec, *, evaluations: int) -> PartSpec:
    """Return the spec of `combine_{T}`: base and history in, base + scale ⊙ Σₜ cₜ·historyₜ + shift (R, N, D) out.

    `history` is (T, 1, R, N, D): a slot's ring whose only unit is a residual. With an output as base, its input as
    history and c = −1 it makes that residual.
    """
    of_channels = (model.width,)
    return PartSpec(
        name=combine_part_name(evaluations),
        inputs=(
            _tokens("base", model),
            _tokens("history", model, evaluations, 1),
            TensorSpec(name="coefficients", dtype=DType.FLOAT32, shape=(evaluations,)),
            TensorSpec(name="scale", dtype=DType.FLOAT32, shape=of_channels),
            TensorSpec(name="shift", dtype=DType.FLOAT32, shape=of_channels),
        ),
        outputs=(_tokens("tokens_out", model),),
    )


def modulated_spec(model: ModelSpec, *, units: int) -> PartSpec:
    """Return the spec of `modulated`: what a block part's first unit computes on, normalised, scaled and shifted."""
    return PartSpec(
        name=modulated_part_name(model, units=units),
        inputs=_modulation_inputs(model, units),
        outputs=(_tokens("tokens_out", model),),
    )


def probe_spec(model: ModelSpec, *, units: int) -> PartSpec:
    """Return the spec of `probe`: weights · mean over tokens of `modulated` + bias, (R,) float32."""
    return PartSpec(
        name=probe_part_name(model, units=units),
        inputs=(
            *_modulation_inputs(model, units),
            TensorSpec(name="weights", dtype=DType.FLOAT32, shape=(model.width,)),
            TensorSpec(name="bias", dtype=DType.FLOAT32, shape=(1,)),
        ),
        outputs=(TensorSpec(name="probe", dtype=DType.FLOAT32, shape=(ROWS,)),),
    )


def extrapolate_spec(model: ModelSpec, *, evaluations: int) -> PartSpec:
    """Return the spec of `extrapolate_{T}`: the last outputs and their factors in, the sampler's update out.

    `history` is (T, 1, B, C, H, W), or with frames: a slot's ring whose only unit is the model's guided output.
    """
    return PartSpec(
        name=extrapolate_part_name(evaluations),
        inputs=(
            _image("latents", model),
            TensorSpec(name="history", dtype=DType.FLOAT32, shape=(evaluations, 1, BATCH, *model.latents.dims)),
            TensorSpec(name="factors", dtype=DType.FLOAT32, shape=(evaluations,)),
            TensorSpec(name="step", dtype=DType.INT64, shape=(1,)),
            TensorSpec(name="coefficients", dtype=DType.FLOAT32, shape=(STEPS, len(COLUMNS))),
            _image("noise", model),
            _image("carried", model),
        ),
        outputs=(_image("latents_out", model), _image("model_output", model), _image("carried_out", model)),
    )


def output_error_spec(model: ModelSpec) -> PartSpec:
    """Return the spec of `output_error`: predicted and fresh outputs in, ‖predicted − fresh‖ / ‖fresh‖ (B,) out."""
    return PartSpec(
        name=OUTPUT_ERROR_PART,
        inputs=(_image("predicted", model), _image("fresh", model)),
        outputs=(TensorSpec(name="error", dtype=DType.FLOAT32, shape=(BATCH,)),),
    )


def has_frames(model: ModelSpec) -> bool:
    """Say whether a model makes clips."""
    return FRAMES in model.latents.axes


def motion_spec(model: ModelSpec) -> PartSpec:
    """Return the spec of `motion`: tokens (R, N, D), frame by frame, and F `frame_positions` in, (R,) float32 out."""
    return PartSpec(
        name=MOTION_PART,
        inputs=(
            _tokens("tokens", model),
            TensorSpec(name="frame_positions", dtype=DType.FLOAT32, shape=(model.latents.dims[1],)),
        ),
        outputs=(TensorSpec(name="motion", dtype=DType.FLOAT32, shape=(ROWS,)),),
    )


def _image(name: str, model: ModelSpec) -> TensorSpec:
    return TensorSpec(name=name, dtype=DType.FLOAT32, shape=(BATCH, *model.latents.dims))


def _tokens(name: str, model: ModelSpec, *leading: Dim) -> TensorSpec:
    return TensorSpec(name=name, dtype=model.precision, shape=(*leading, ROWS, model.latents.tokens_dim, model.width))


def _modulation(model: ModelSpec, units: int) -> TensorSpec:
    rows = MODULATIONS_PER_UNIT * units
    return TensorSpec(name="modulation", dtype=model.precision, shape=(STEPS, ROWS, rows, model.width))


def _modulation_inputs(model: ModelSpec, units: int) -> tuple[TensorSpec, ...]:
    step = TensorSpec(name="step", dtype=DType.INT64, shape=(1,))
    return (_tokens("tokens", model), _modulation(model, units), step)


def _history_inputs(model: ModelSpec, units: int, evaluations: int) -> tuple[TensorSpec, ...]:
    return (
        _tokens("history", model, evaluations, units),
        _modulation(model, units),
        TensorSpec(name="gate_steps", dtype=DType.INT64, shape=(evaluations,)),
        TensorSpec(name="coefficients", dtype=DType.FLOAT32, shape=(evaluations,)),
    )
