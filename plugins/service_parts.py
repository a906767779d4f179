"""Specs of the service parts: what the runtime launches between blocks. Plain values, no ONNX.

`signals` measures how far a block's input is from the one its slot was filled with. `predict_{T}` stands for a block
from its last T evaluations, and `blend_{T}` mixes that estimate with a fresh output. Parts of n transformer blocks
have U = 2n units. The most common n of a model has the short names; any other is called `predict_{T}_n{n}`.
`extrapolate_{T}` stands for a whole step, from the model's last T outputs, and `output_error` says how well it did.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.shapes import BATCH, ROWS, STEPS
from adacorr_deploy.core.specs import MODULATIONS_PER_BLOCK, Dim, DType, ModelSpec, PartSpec, TensorSpec

MAX_EVALUATIONS: Final = 3  # T goes from 1 (hold) to 3 (second-order extrapolation)
SIGNALS_PART: Final = "signals"
OUTPUT_ERROR_PART: Final = "output_error"
SIGNAL_COUNT: Final = 5  # the fields of caching.decisions.Signals, in order
GATE_ROWS: Final = (2, 5)  # which of a block's six modulation rows are the gates of the attention and of the MLP


def common_block_count(model: ModelSpec) -> int:
    """Return the number of transformer blocks that most block parts of a model hold (the first met, if tied)."""
    return Counter(model.blocks).most_common(1)[0][0]


def predict_part_name(model: ModelSpec, *, blocks: int, evaluations: int) -> str:
    """Return the predict part for a block part of `blocks` transformer blocks and T = `evaluations`."""
    return _part_name("predict", model, blocks, evaluations)


def blend_part_name(model: ModelSpec, *, blocks: int, evaluations: int) -> str:
    """Return the blend part for a block part of `blocks` transformer blocks and T = `evaluations`."""
    return _part_name("blend", model, blocks, evaluations)


def extrapolate_part_name(evaluations: int) -> str:
    """Return the extrapolate part for T = `evaluations`."""
    return f"extrapolate_{evaluations}"


def _part_name(stem: str, model: ModelSpec, blocks: int, evaluations: int) -> str:
    suffix = "" if blocks == common_block_count(model) else f"_n{blocks}"
    return f"{stem}_{evaluations}{suffix}"


def service_part_specs(model: ModelSpec) -> dict[str, PartSpec]:
    """Return the spec of each service part that a model's runtime may launch, by name."""
    specs = [signals_spec(model)]
    for blocks in dict.fromkeys(model.blocks):
        for evaluations in range(1, MAX_EVALUATIONS + 1):
            specs.append(predict_spec(model, blocks=blocks, evaluations=evaluations))
            specs.append(blend_spec(model, blocks=blocks, evaluations=evaluations))
    specs += [extrapolate_spec(model, evaluations=count) for count in range(1, MAX_EVALUATIONS + 1)]
    specs.append(output_error_spec(model))
    return {spec.name: spec for spec in specs}


def signals_spec(model: ModelSpec) -> PartSpec:
    """Return the spec of `signals`: tokens and reference (R, N, D) in, signals (R, 5) float32 out."""
    return PartSpec(
        name=SIGNALS_PART,
        inputs=(_tokens("tokens", model), _tokens("reference", model)),
        outputs=(TensorSpec(name="signals", dtype=DType.FLOAT32, shape=(ROWS, SIGNAL_COUNT)),),
    )


def predict_spec(model: ModelSpec, *, blocks: int, evaluations: int) -> PartSpec:
    """Return the spec of `predict_{T}`: tokens, the slot's history and its weights in, tokens_out (R, N, D) out."""
    return PartSpec(
        name=predict_part_name(model, blocks=blocks, evaluations=evaluations),
        inputs=(_tokens("tokens", model), *_history_inputs(model, blocks, evaluations)),
        outputs=(_tokens("tokens_out", model),),
    )


def blend_spec(model: ModelSpec, *, blocks: int, evaluations: int) -> PartSpec:
    """Return the spec of `blend_{T}`: as predict over `base`, with a fresh output, estimates and thresholds."""
    return PartSpec(
        name=blend_part_name(model, blocks=blocks, evaluations=evaluations),
        inputs=(
            _tokens("base", model),
            *_history_inputs(model, blocks, evaluations),
            _tokens("fresh", model),
            TensorSpec(name="estimate", dtype=DType.FLOAT32, shape=(ROWS,)),
            TensorSpec(name="thresholds", dtype=DType.FLOAT32, shape=(3,)),
        ),
        outputs=(_tokens("tokens_out", model), TensorSpec(name="weight", dtype=DType.FLOAT32, shape=(ROWS,))),
    )


def extrapolate_spec(model: ModelSpec, *, evaluations: int) -> PartSpec:
    """Return the spec of `extrapolate_{T}`: the last outputs and their factors in, the sampler's update out.

    `history` is (T, 1, B, C, H, W): a slot's ring whose only unit is the model's guided output.
    """
    return PartSpec(
        name=extrapolate_part_name(evaluations),
        inputs=(
            _image("latents", model),
            TensorSpec(name="history", dtype=DType.FLOAT32, shape=(evaluations, 1, BATCH, *model.latent_shape)),
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


def _image(name: str, model: ModelSpec) -> TensorSpec:
    return TensorSpec(name=name, dtype=DType.FLOAT32, shape=(BATCH, *model.latent_shape))


def _tokens(name: str, model: ModelSpec, *leading: Dim) -> TensorSpec:
    return TensorSpec(name=name, dtype=model.precision, shape=(*leading, ROWS, model.tokens, model.width))


def _history_inputs(model: ModelSpec, blocks: int, evaluations: int) -> tuple[TensorSpec, ...]:
    modulation = (STEPS, ROWS, MODULATIONS_PER_BLOCK * blocks, model.width)
    return (
        _tokens("history", model, evaluations, len(GATE_ROWS) * blocks),
        TensorSpec(name="modulation", dtype=model.precision, shape=modulation),
        TensorSpec(name="gate_steps", dtype=DType.INT64, shape=(evaluations,)),
        TensorSpec(name="coefficients", dtype=DType.FLOAT32, shape=(evaluations,)),
    )
