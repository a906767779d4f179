"""What every part is given when it is checked: the tensors of a real run's middle step, none of them random numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.prompts import TEXT_ENCODER_PART, TextEncoderSpec
from adacorr_deploy.core.specs import DECODE_PART, DecoderSpec, ModelSpec, PartSpec, PromptSpec
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.plugins.service_parts import (
    MAX_EVALUATIONS,
    MOTION_PART,
    OUTPUT_ERROR_PART,
    SIGNALS_PART,
    blend_part_name,
    combine_part_name,
    extrapolate_part_name,
    has_frames,
    modulated_part_name,
    predict_part_name,
    probe_part_name,
)
from adacorr_deploy.quality.reference import initial_latents, runtime_noises
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.request import table_from_request
from adacorr_deploy.runtime.workspace import Workspace

Arrays = Mapping[str, NDArray[np.generic]]

MIN_STEPS: Final = 2 * MAX_EVALUATIONS  # so that the middle step has that many before it
# Extrapolation through the last T evaluations by order T − 1, newest first.
_COEFFICIENTS: Final = ((1.0,), (2.0, -1.0), (3.0, -3.0, 1.0))
_THRESHOLDS: Final = (0.03, 0.09, 1.0)  # τ_reuse, τ_recompute, γ
_ESTIMATES: Final = (0.0, 0.12)  # spread over the rows: below τ_reuse, between, and above τ_recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """What went into and came out of a block part at one step."""

    step: int
    tokens: NDArray[np.generic]  # (R, N, D)
    units: NDArray[np.generic]  # (U, R, N, D)
    tokens_out: NDArray[np.generic]  # (R, N, D)


def part_inputs(reference: Pipeline, request: SampleRequest) -> dict[str, Arrays]:
    """Run the reference to its middle step, and return the inputs of every part there, by part and tensor.

    Service parts get the slot that the steps before would have filled, of one block part of each size.

    Args:
        reference: A pipeline in float32.
        request: Of at least `MIN_STEPS` steps.
    """
    model, middle = reference.manifest.model, request.steps // 2
    table = table_from_request(request, model, reference.manifest.schedule)
    size = RunSize.of(request, history=0, whole_steps=False)
    noises = runtime_noises(reference, request)
    studied = {model.units.index(units): deque[_Evaluation](maxlen=MAX_EVALUATIONS + 1) for units in model.units}
    outputs = deque[NDArray[np.generic]](maxlen=MAX_EVALUATIONS + 1)  # of the model, (1, B, C, H, W) each
    inputs: dict[str, Arrays] = {}
    with reference.lease(size, references=lambda block: 0) as (space, slots):
        space.prepare(request, table, initial_latents(reference, request))
        for step in range(middle + 1):
            space.embed(step)
            for block, slot in enumerate(slots):
                if step == middle:  # now: the block after the next overwrites them
                    part = reference.session(model.block_names[block]).spec
                    inputs[part.name] = {**_named(space, part), **_block_inputs(space, block)}
                space.evaluate(block, slot)
                if block in studied:
                    studied[block].append(_evaluation(space, step, block, slot.ring[0]))
            if step == middle:
                of_image = _image_inputs(space, model, step, noises[step])
                inputs |= {
                    name: {**_named(space, reference.session(name).spec), **given} for name, given in of_image.items()
                }
            space.head(step, noises[step])
            outputs.append(space.slots.output.ring[0].read())
    for block, evaluations in studied.items():
        modulation = inputs[model.block_names[block]]["modulation"]
        inputs |= _block_service_inputs(model, model.units[block], modulation, list(evaluations))
    if (decoder := reference.manifest.decoder) is not None:
        inputs[DECODE_PART] = {"latents": _decoder_tile(inputs["head"]["latents"][0], decoder)}
    if has_frames(model):
        last = next(iter(studied.values()))[-1]
        frames = model.latents.frames_at(request.size)
        inputs[MOTION_PART] = {
            "tokens": _residual(last),
            "frame_positions": np.arange(frames, dtype=np.float32),
        }
    encoder, prompt = reference.manifest.text_encoder, model.conditions.prompt
    if encoder is not None and prompt is not None:
        inputs[TEXT_ENCODER_PART] = _text_encoder_inputs(encoder, prompt)
    return inputs | _output_service_inputs(inputs["head"], list(outputs))


def _text_encoder_inputs(encoder: TextEncoderSpec, prompt: PromptSpec) -> Arrays:
    """Return a prompt of different tokens, the last quarter padding."""
    positions = np.arange(prompt.tokens)
    real = positions < max(1, prompt.tokens * 3 // 4)
    tokens = np.where(real, (1 + positions) % encoder.vocabulary, encoder.padding)
    return {"prompt_tokens": tokens[None], "prompt_mask": real[None].astype(np.int64)}


def _named(space: Workspace, spec: PartSpec) -> Arrays:
    """Return what a part takes by name, of the request and of what the condition part made."""
    return {each.name: space.named[each.name].read() for each in spec.inputs if each.name in space.named}


def _decoder_tile(latents: NDArray[np.generic], decoder: DecoderSpec) -> NDArray[np.generic]:
    """Return a tile's first chunk of an image's latents (C, H, W) or a clip's (C, F, H, W): (f, C, h, w)."""
    frames = latents[None] if latents.ndim == len("CHW") else latents.swapaxes(0, 1)
    height, width = decoder.tile
    return frames[: decoder.frames, :, :height, :width]


def _evaluation(space: Workspace, step: int, block: int, units: Buffer) -> _Evaluation:
    return _Evaluation(
        step=step,
        tokens=space.block_input(block).read(),
        units=units.read(),
        tokens_out=space.block_output(block).read(),
    )


def _block_inputs(space: Workspace, block: int) -> Arrays:
    return {
        "tokens": space.block_input(block).read(),
        "modulation": space.blocks.modulation[block].read(),
        "step": space.image.step.read(),
    }


def _image_inputs(
    space: Workspace, model: ModelSpec, step: int, noise: NDArray[np.float32] | None
) -> dict[str, Arrays]:
    """Return the inputs of embed, condition and head but for those that parts take by name."""
    image, latents = space.image, space.image.latents[step % 2].read()
    return {
        "embed": {"latents": latents, "branches": image.branches.read()},
        "condition": {},
        "head": {
            "tokens": space.block_input(len(model.units)).read(),
            "modulation": space.blocks.modulation_head.read(),
            "step": image.step.read(),
            "latents": latents,
            "guidance": image.guidance.read(),
            "coefficients": image.coefficients.read(),
            "noise": np.zeros_like(latents) if noise is None else noise,
            "carried": image.carried[step % 2].read(),
        },
    }


def _block_service_inputs(
    model: ModelSpec, units: int, modulation: NDArray[np.generic], evaluations: Sequence[_Evaluation]
) -> dict[str, Arrays]:
    """Return the inputs of signals and combine, and of predict, blend, modulated and probe for parts of `units`.

    Args:
        model: The model.
        units: In the part.
        modulation: Of the part, (S, R, 3U, D).
        evaluations: The `MAX_EVALUATIONS` that a slot holds, oldest first, and that of the present step.
    """
    *kept, present = evaluations
    inputs: dict[str, Arrays] = {SIGNALS_PART: {"tokens": present.tokens, "reference": kept[-1].tokens}}
    observed: Arrays = {"tokens": present.tokens, "modulation": modulation, "step": np.asarray([present.step])}
    inputs[modulated_part_name(model, units=units)] = observed
    channels = _channels(model)
    inputs[probe_part_name(model, units=units)] = {**observed, "weights": channels, "bias": channels[:1]}
    for coefficients in _COEFFICIENTS:
        count = len(coefficients)
        used = kept[-count:]
        history: Arrays = {
            "history": np.stack([evaluation.units for evaluation in used]),
            "modulation": modulation,
            # Each evaluation with its own step's gates, so that a part which takes the wrong row shows.
            "gate_steps": np.asarray([evaluation.step for evaluation in used], dtype=np.int64),
            "coefficients": np.asarray(coefficients[::-1], dtype=np.float32),
        }
        inputs[predict_part_name(model, units=units, evaluations=count)] = {"tokens": present.tokens, **history}
        inputs[blend_part_name(model, units=units, evaluations=count)] = {
            "base": kept[-1].tokens,
            "fresh": present.tokens_out,
            "estimate": np.linspace(*_ESTIMATES, len(present.tokens), dtype=np.float32),
            "thresholds": np.asarray(_THRESHOLDS, dtype=np.float32),
            **history,
        }
        inputs[combine_part_name(count)] = {
            "base": present.tokens,
            "history": np.stack([_residual(evaluation) for evaluation in used])[:, None],
            "coefficients": history["coefficients"],
            "scale": 1 + channels,
            "shift": channels,
        }
    return inputs


def _residual(evaluation: _Evaluation) -> NDArray[np.float32]:
    """Return what a part added to its tokens, (R, N, D)."""
    return evaluation.tokens_out.astype(np.float32) - evaluation.tokens.astype(np.float32)


def _channels(model: ModelSpec) -> NDArray[np.float32]:
    """Return a number of its own for each channel, (D,), so that a part which takes the wrong one shows."""
    return np.linspace(-0.5, 0.5, model.width, dtype=np.float32)


def _output_service_inputs(head: Arrays, outputs: Sequence[NDArray[np.generic]]) -> dict[str, Arrays]:
    """Return the inputs of extrapolate and output_error, from the head's inputs and the last outputs, oldest first."""
    *kept, present = outputs
    inputs: dict[str, Arrays] = {OUTPUT_ERROR_PART: {"predicted": kept[-1][0], "fresh": present[0]}}
    for coefficients in _COEFFICIENTS:
        inputs[extrapolate_part_name(len(coefficients))] = {
            **{name: head[name] for name in ("latents", "step", "coefficients", "noise", "carried")},
            "history": np.stack(kept[-len(coefficients) :]),
            "factors": np.asarray(coefficients[::-1], dtype=np.float32),
        }
    return inputs
