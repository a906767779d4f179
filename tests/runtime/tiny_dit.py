"""A DiT small enough to follow by hand: each part of a bundle as a NumPy function, and its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS, Dim
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec, TensorSpec
from adacorr_deploy.plugins import oracle, service_part_specs
from tests.models import model_spec

Array = NDArray[np.float32]
Tensors = Mapping[str, NDArray[np.generic]]
Part = Callable[[Tensors], dict[str, NDArray[np.generic]]]

TOKENS, WIDTH, SIDE = 4, 4, 4
UNITS = (2, 4, 2)  # the middle part is a segment of two transformer blocks
HALVES = (1,) * sum(UNITS)  # the same model, cut into attention and MLP halves
SCHEDULE = NoiseSchedule(betas=tuple(np.linspace(1e-4, 0.02, 100).tolist()))
EPSILON = 1e-6


def tiny_spec(*, learned_variance: bool = False, units: tuple[int, ...] = UNITS) -> ModelSpec:
    return model_spec(
        latent_shape=(1, SIDE, SIDE), width=WIDTH, num_classes=3, units=units, learned_variance=learned_variance
    )


class TinyDiT:
    """The parts' mathematics. Every row is computed by itself, so results do not depend on the batch."""

    def __init__(self, *, learned_variance: bool = False, seed: int = 0, units: tuple[int, ...] = UNITS) -> None:
        self.spec = tiny_spec(learned_variance=learned_variance, units=units)
        random = np.random.default_rng(seed)

        def weight(*shape: int) -> Array:
            return (random.standard_normal(shape) / 2).astype(np.float32)

        self._embed, self._position = weight(4, WIDTH), weight(TOKENS, WIDTH)
        self._labels, self._frequencies = weight(4, WIDTH), weight(WIDTH)
        self._modulation = np.concatenate([weight(WIDTH, 3 * count * WIDTH) for count in UNITS], axis=1)
        self._modulation_head = weight(WIDTH, 2 * WIDTH)
        self._mix, self._attention, self._mlp = (
            np.concatenate([weight(count // 2, size, size) for count in UNITS]) for size in (TOKENS, WIDTH, WIDTH)
        )
        self._head = weight(WIDTH, 4 * (2 if learned_variance else 1))

    def parts(self) -> dict[str, tuple[PartSpec, Part]]:
        """Return every part of the bundle by name."""
        parts: dict[str, tuple[PartSpec, Part]] = {
            "embed": (_embed_spec(), self.embed),
            "condition": (_condition_spec(self.spec.units), self.condition),
        }
        for index, name in enumerate(self.spec.block_names):
            parts[name] = (_block_spec(name, self.spec.unit_names(index)), self._block_part(index))
        parts["head"] = (_head_spec(), self.head)
        for name, spec in service_part_specs(self.spec).items():
            stem = next(stem for stem in SERVICE_PARTS if name.startswith(stem))
            parts[name] = (spec, SERVICE_PARTS[stem])
        return parts

    def _block_part(self, index: int) -> Part:
        return lambda tensors: self.block(index, tensors)

    def embed(self, tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        latents = _f32(tensors["latents"])
        patches = latents.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, TOKENS, 4)
        tokens = patches @ self._embed + self._position
        return {"tokens": np.concatenate([tokens] * len(tensors["branches"]))}

    def condition(self, tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        time = np.sin(_f32(tensors["timesteps"])[:, None] * self._frequencies)  # (S, D)
        hidden = time[:, None] + self._labels[tensors["labels"].astype(np.int64)]  # (S, R, D)
        shape = hidden.shape[:2]
        rows = np.tanh(hidden @ self._modulation).reshape(*shape, -1, WIDTH)
        ends = 3 * np.cumsum(self.spec.units)
        modulations = {
            f"modulation_{index:02d}": rows[:, :, end - 3 * count : end]
            for index, (end, count) in enumerate(zip(ends, self.spec.units, strict=True))
        }
        return {**modulations, "modulation_head": (hidden @ self._modulation_head).reshape(*shape, 2, WIDTH)}

    def block(self, index: int, tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        tokens = _f32(tensors["tokens"])
        modulation = _f32(tensors["modulation"])[int(tensors["step"][0])]  # (R, 3U, D)
        units: dict[str, NDArray[np.generic]] = {}
        first = sum(self.spec.units[:index])
        for inner, name in enumerate(self.spec.unit_names(index)):
            shift, scale, gate = np.moveaxis(modulation[:, 3 * inner : 3 * inner + 3, None], 1, 0)
            units[name] = self._unit(first + inner, tokens, shift, scale)
            tokens = tokens + gate * units[name]
        return {"tokens_out": tokens, **units}

    def _unit(self, unit: int, tokens: Array, shift: Array, scale: Array) -> Array:
        block = unit // 2
        if unit % 2 == 0:
            mixed = self._mix[block] @ (np.tanh(tokens) * (1 + scale) + shift)
            return np.asarray(mixed @ self._attention[block])
        return np.asarray(np.tanh((tokens * (1 + scale) + shift) @ self._mlp[block]))

    def head(self, tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        step = int(tensors["step"][0])
        shift, scale = np.moveaxis(_f32(tensors["modulation"])[step][:, :, None], 1, 0)
        patches = np.tanh(_f32(tensors["tokens"]) * (1 + scale) + shift) @ self._head
        latents, guidance = _f32(tensors["latents"]), _f32(tensors["guidance"])
        batch = len(latents)
        images = patches.reshape(-1, 2, 2, 2, 2, patches.shape[-1] // 4)
        images = images.transpose(0, 5, 1, 3, 2, 4).reshape(len(guidance), batch, -1, SIDE, SIDE)
        output = sum(weight[:, None, None, None] * image[:, :1] for weight, image in zip(guidance, images, strict=True))
        row = dict(zip(COLUMNS, _f32(tensors["coefficients"])[step], strict=True))
        deviation = np.float32(1.0)
        if self.spec.learned_variance:
            low, high = row["log_variance_min"], row["log_variance_max"]
            deviation = np.exp((low + (images[0][:, 1:] + 1) / 2 * (high - low)) / 2)
        after = row["latents"] * latents + row["output"] * output + row["carried"] * _f32(tensors["carried"])
        after = after + row["noise"] * deviation * _f32(tensors["noise"])
        carried = row["carried_of_latents"] * latents + row["carried_of_output"] * output
        return {"latents_out": after, "model_output": np.asarray(output), "carried_out": np.asarray(carried)}


def signals(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    tokens, reference = _f32(tensors["tokens"]), _f32(tensors["reference"])
    offset = np.linalg.norm(tokens - reference, axis=-1)  # (R, N)
    ratio = offset / (np.linalg.norm(reference, axis=-1) + EPSILON)
    rank = TOKENS - int(np.ceil(0.95 * TOKENS)) + 1
    spread, spread_before = tokens.std(axis=-1).mean(axis=-1), reference.std(axis=-1).mean(axis=-1)
    columns = [
        np.sqrt(np.square(ratio).mean(axis=-1)),
        np.sort(ratio, axis=-1)[:, -rank],
        np.abs(spread / (spread_before + EPSILON) - 1),
        offset.mean(axis=-1),
        spread,
        np.abs(tokens - reference).mean(axis=(1, 2)),
        np.abs(reference).mean(axis=(1, 2)),
        np.square(tokens - reference).mean(axis=(1, 2)),
        np.square(reference).mean(axis=(1, 2)),
    ]
    return {"signals": np.stack(columns, axis=1)}


def combine(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    weights = _f32(tensors["coefficients"])[:, None, None, None, None] * _f32(tensors["scale"])
    summed = (weights * _f32(tensors["history"])).sum(axis=(0, 1), dtype=np.float32)
    return {"tokens_out": _f32(tensors["base"]) + summed + _f32(tensors["shift"])}


def modulated(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    tokens = _f32(tensors["tokens"])
    shift, scale = np.moveaxis(_f32(tensors["modulation"])[int(tensors["step"][0])][:, :2, None], 1, 0)
    deviation = np.sqrt(tokens.var(axis=2, keepdims=True) + np.float32(1e-6))
    return {"tokens_out": (tokens - tokens.mean(axis=2, keepdims=True)) / deviation * (1 + scale) + shift}


def probe(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    means = modulated(tensors)["tokens_out"].mean(axis=1)
    return {"probe": np.asarray(means @ _f32(tensors["weights"]) + _f32(tensors["bias"]), np.float32)}


def extrapolate(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    row = tensors["coefficients"][int(tensors["step"][0])]
    named = {name: _f32(tensors[name]) for name in ("latents", "history", "factors", "noise", "carried")}
    latents, output, carried = oracle.extrapolate(**named, sampler_row=_f32(row))
    return {"latents_out": latents, "model_output": output, "carried_out": carried}


def output_error(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    return {"error": oracle.output_error(_f32(tensors["predicted"]), _f32(tensors["fresh"]))}


def motion(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    tokens = _f32(tensors["tokens"])
    return {"motion": oracle.motion(tokens.reshape(len(tokens), len(tensors["frame_positions"]), -1))}


def predict(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    return {"tokens_out": _f32(tensors["tokens"]) + _residual(tensors)}


def blend(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    cached = _f32(tensors["base"]) + _residual(tensors)
    reuse, recompute, gamma = _f32(tensors["thresholds"])
    weight = np.clip(gamma * (_f32(tensors["estimate"]) - reuse) / (recompute - reuse), 0, 1)
    weight = np.where(np.isfinite(tensors["estimate"].astype(np.float32)), weight, 1).astype(np.float32)
    mixed = (1 - weight[:, None, None]) * cached + weight[:, None, None] * _f32(tensors["fresh"])
    return {"tokens_out": mixed, "weight": weight}


def _residual(tensors: Tensors) -> Array:
    history, modulation = _f32(tensors["history"]), _f32(tensors["modulation"])
    total = np.zeros(history.shape[2:], dtype=np.float32)
    for entry, (coefficient, step) in enumerate(zip(tensors["coefficients"], tensors["gate_steps"], strict=True)):
        for unit in range(history.shape[1]):
            gate = modulation[int(step), :, 3 * unit + 2, None]  # (R, 1, D)
            total += (_f32(coefficient) * gate) * history[entry, unit]
    return total


def _f32(values: NDArray[np.generic] | np.generic) -> Array:
    return np.asarray(values, dtype=np.float32)


SERVICE_PARTS: Mapping[str, Part] = {  # by the first words of their names
    "signals": signals,
    "predict": predict,
    "blend": blend,
    "combine": combine,
    "modulated": modulated,
    "probe": probe,
    "extrapolate": extrapolate,
    "output_error": output_error,
    "motion": motion,
}


# --- Specs -------------------------------------------------------------------------------------------------------


def _f(name: str, *shape: Dim) -> TensorSpec:
    return TensorSpec(name=name, dtype=DType.FLOAT32, shape=shape)


def _i(name: str, *shape: Dim) -> TensorSpec:
    return TensorSpec(name=name, dtype=DType.INT64, shape=shape)


def _rows(name: str) -> TensorSpec:
    return _f(name, ROWS, TOKENS, WIDTH)


def _image(name: str) -> TensorSpec:
    return _f(name, BATCH, 1, SIDE, SIDE)


def _embed_spec() -> PartSpec:
    return PartSpec(name="embed", inputs=(_image("latents"), _f("branches", BRANCHES)), outputs=(_rows("tokens"),))


def _condition_spec(units: tuple[int, ...]) -> PartSpec:
    tables = [_f(f"modulation_{i:02d}", STEPS, ROWS, 3 * count, WIDTH) for i, count in enumerate(units)]
    return PartSpec(
        name="condition",
        inputs=(_f("timesteps", STEPS), _i("labels", ROWS)),
        outputs=(*tables, _f("modulation_head", STEPS, ROWS, 2, WIDTH)),
    )


def _block_spec(name: str, units: tuple[str, ...]) -> PartSpec:
    return PartSpec(
        name=name,
        inputs=(_rows("tokens"), _f("modulation", STEPS, ROWS, 3 * len(units), WIDTH), _i("step", 1)),
        outputs=(_rows("tokens_out"), *(_rows(unit) for unit in units)),
    )


def _head_spec() -> PartSpec:
    return PartSpec(
        name="head",
        inputs=(
            _rows("tokens"),
            _f("modulation", STEPS, ROWS, 2, WIDTH),
            _i("step", 1),
            _image("latents"),
            _f("guidance", BRANCHES, BATCH),
            _f("coefficients", STEPS, len(COLUMNS)),
            _image("noise"),
            _image("carried"),
        ),
        outputs=(_image("latents_out"), _image("model_output"), _image("carried_out")),
    )
