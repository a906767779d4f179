"""A DiT small enough to follow by hand: each part of a bundle as a NumPy function, and its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS
from adacorr_deploy.core.specs import Dim, DType, ModelSpec, PartSpec, TensorSpec
from adacorr_deploy.plugins import oracle, service_part_specs

Array = NDArray[np.float32]
Tensors = Mapping[str, NDArray[np.generic]]
Part = Callable[[Tensors], dict[str, NDArray[np.generic]]]

TOKENS, WIDTH, SIDE = 4, 4, 4
BLOCKS = (1, 2, 1)  # the middle part is a segment of two transformer blocks
SCHEDULE = NoiseSchedule(betas=tuple(np.linspace(1e-4, 0.02, 100).tolist()))
EPSILON = 1e-6


def tiny_spec(*, learned_variance: bool = False) -> ModelSpec:
    return ModelSpec(
        family="tiny",
        precision=DType.FLOAT32,
        latent_shape=(1, SIDE, SIDE),
        tokens=TOKENS,
        width=WIDTH,
        num_classes=3,
        blocks=BLOCKS,
        learned_variance=learned_variance,
    )


class TinyDiT:
    """The parts' mathematics. Every row is computed by itself, so results do not depend on the batch."""

    def __init__(self, *, learned_variance: bool = False, seed: int = 0) -> None:
        self.spec = tiny_spec(learned_variance=learned_variance)
        random = np.random.default_rng(seed)

        def weight(*shape: int) -> Array:
            return (random.standard_normal(shape) / 2).astype(np.float32)

        self._embed, self._position = weight(4, WIDTH), weight(TOKENS, WIDTH)
        self._labels, self._frequencies = weight(4, WIDTH), weight(WIDTH)
        self._modulation = [weight(WIDTH, 6 * blocks * WIDTH) for blocks in BLOCKS]
        self._modulation_head = weight(WIDTH, 2 * WIDTH)
        self._mix = [weight(blocks, TOKENS, TOKENS) for blocks in BLOCKS]
        self._attention = [weight(blocks, WIDTH, WIDTH) for blocks in BLOCKS]
        self._mlp = [weight(blocks, WIDTH, WIDTH) for blocks in BLOCKS]
        self._head = weight(WIDTH, 4 * (2 if learned_variance else 1))

    def parts(self) -> dict[str, tuple[PartSpec, Part]]:
        """Return every part of the bundle by name."""
        parts: dict[str, tuple[PartSpec, Part]] = {
            "embed": (_embed_spec(), self.embed),
            "condition": (_condition_spec(), self.condition),
        }
        for index, name in enumerate(self.spec.block_names):
            parts[name] = (_block_spec(name, BLOCKS[index]), self._block_part(index))
        parts["head"] = (_head_spec(), self.head)
        parts["signals"] = (_signals_spec(), signals)
        for entries in (1, 2, 3):
            for blocks, suffix in ((1, ""), (2, "_n2")):
                for kind, function in (("predict", predict), ("blend", blend)):
                    name = f"{kind}_{entries}{suffix}"
                    parts[name] = (_cached_spec(name, kind, entries, blocks), function)
        specs = service_part_specs(tiny_spec())
        for count in range(1, 4):
            parts[f"extrapolate_{count}"] = (specs[f"extrapolate_{count}"], extrapolate)
        parts["output_error"] = (specs["output_error"], output_error)
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
        modulations = {
            f"modulation_{index:02d}": np.tanh(hidden @ weight).reshape(*shape, -1, WIDTH)
            for index, weight in enumerate(self._modulation)
        }
        return {**modulations, "modulation_head": (hidden @ self._modulation_head).reshape(*shape, 2, WIDTH)}

    def block(self, index: int, tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        tokens = _f32(tensors["tokens"])
        modulation = _f32(tensors["modulation"])[int(tensors["step"][0])]  # (R, 6n, D)
        units: dict[str, NDArray[np.generic]] = {}
        for inner in range(BLOCKS[index]):
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = np.moveaxis(
                modulation[:, 6 * inner : 6 * inner + 6, None], 1, 0
            )
            mixed = self._mix[index][inner] @ (np.tanh(tokens) * (1 + scale_a) + shift_a)
            units[f"attention_{inner}"] = attention = mixed @ self._attention[index][inner]
            tokens = tokens + gate_a * attention
            units[f"mlp_{inner}"] = mlp = np.tanh((tokens * (1 + scale_m) + shift_m) @ self._mlp[index][inner])
            tokens = tokens + gate_m * mlp
        return {"tokens_out": tokens, **units}

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
    ]
    return {"signals": np.stack(columns, axis=1)}


def extrapolate(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    row = tensors["coefficients"][int(tensors["step"][0])]
    named = {name: _f32(tensors[name]) for name in ("latents", "history", "factors", "noise", "carried")}
    latents, output, carried = oracle.extrapolate(**named, sampler_row=_f32(row))
    return {"latents_out": latents, "model_output": output, "carried_out": carried}


def output_error(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
    return {"error": oracle.output_error(_f32(tensors["predicted"]), _f32(tensors["fresh"]))}


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
            gate = modulation[int(step), :, 6 * (unit // 2) + (2, 5)[unit % 2], None]  # (R, 1, D)
            total += (_f32(coefficient) * gate) * history[entry, unit]
    return total


def _f32(values: NDArray[np.generic] | np.generic) -> Array:
    return np.asarray(values, dtype=np.float32)


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


def _condition_spec() -> PartSpec:
    tables = [_f(f"modulation_{i:02d}", STEPS, ROWS, 6 * blocks, WIDTH) for i, blocks in enumerate(BLOCKS)]
    return PartSpec(
        name="condition",
        inputs=(_f("timesteps", STEPS), _i("labels", ROWS)),
        outputs=(*tables, _f("modulation_head", STEPS, ROWS, 2, WIDTH)),
    )


def _block_spec(name: str, blocks: int) -> PartSpec:
    units = [_rows(f"{kind}_{inner}") for inner in range(blocks) for kind in ("attention", "mlp")]
    return PartSpec(
        name=name,
        inputs=(_rows("tokens"), _f("modulation", STEPS, ROWS, 6 * blocks, WIDTH), _i("step", 1)),
        outputs=(_rows("tokens_out"), *units),
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


def _signals_spec() -> PartSpec:
    return PartSpec(name="signals", inputs=(_rows("tokens"), _rows("reference")), outputs=(_f("signals", ROWS, 5),))


def _cached_spec(name: str, kind: str, entries: int, blocks: int) -> PartSpec:
    cache = (
        _f("history", entries, 2 * blocks, ROWS, TOKENS, WIDTH),
        _f("modulation", STEPS, ROWS, 6 * blocks, WIDTH),
        _i("gate_steps", entries),
        _f("coefficients", entries),
    )
    if kind == "predict":
        return PartSpec(name=name, inputs=(_rows("tokens"), *cache), outputs=(_rows("tokens_out"),))
    mixing = (_rows("base"), _rows("fresh"), _f("estimate", ROWS), _f("thresholds", 3))
    return PartSpec(name=name, inputs=(*cache, *mixing), outputs=(_rows("tokens_out"), _f("weight", ROWS)))
