"""Invariant: the parts of PixArt-α and Σ, in ONNX Runtime, compute what diffusers' own model computes, at any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from adacorr_deploy.core.specs import HALVES, DType
from adacorr_deploy.exporters import export_parts, monolithic_step_onnx, reference_modules
from tests.exporters.conftest import Arrays, Exported
from tests.exporters.random_pixart import (
    ALPHA_512,
    ALPHA_1024,
    BARE,
    PROMPT_TOKENS,
    PROMPT_WIDTH,
    SIGMA_1024,
    adapted,
    loaded_pixart,
    random_pixart,
)

VARIANTS: Mapping[str, Mapping[str, object]] = {
    "alpha-512": ALPHA_512,
    "alpha-1024": ALPHA_1024,
    "sigma-1024": SIGMA_1024,
    "bare": BARE,
}
SIZES = [(8, 8), (12, 4), (2, 16)]
TIMESTEPS = [999.0, 500.0, 3.0]
Export = Callable[..., Exported]


class InPyTorch(Exported):
    """The parts as modules: what differs between the variants is compared here, and what ONNX makes of it once."""

    def run(self, name: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        outputs = _modules(self.folder.name)[name](**{key: torch.from_numpy(value) for key, value in inputs.items()})
        names = [tensor.name for tensor in self.specs[name].outputs]
        return {key: output.numpy() for key, output in zip(names, outputs, strict=True)}


@cache
def _modules(variant: str) -> Mapping[str, torch.nn.Module]:
    return reference_modules(loaded_pixart(random_pixart(VARIANTS[variant])))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    @cache
    def export(variant: str, precision: DType = DType.FLOAT32, segment: int = 1) -> Exported:
        model = loaded_pixart(random_pixart(VARIANTS[variant]))
        if variant != "alpha-1024":
            specs = {part.spec.name: part.spec for part in model.parts(precision, segment)}
            return InPyTorch(Path(variant), specs)
        folder = tmp_path_factory.mktemp("pixart")
        specs = export_parts(model, folder, precision, segment)
        if segment == 1 and precision is DType.FLOAT32:
            specs["step"] = monolithic_step_onnx(model, folder, precision, segment)
        return Exported(folder, specs)

    return export


def relative_error(actual: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def prompts(rows: int) -> dict[str, NDArray[np.generic]]:
    """Random prompts of different lengths; the last has one real token."""
    draw = np.random.default_rng(rows)
    lengths = np.linspace(PROMPT_TOKENS, 1, rows).round().astype(int)
    return {
        "prompt_embeddings": draw.standard_normal((rows, PROMPT_TOKENS, PROMPT_WIDTH)).astype(np.float32),
        "prompt_mask": (np.arange(PROMPT_TOKENS) < lengths[:, None]).astype(np.int64),
    }


def condition_inputs(parts: Exported, rows: int, size: tuple[int, int]) -> Arrays:
    """What a request gives the condition part, of what it takes."""
    known = {
        "timesteps": np.array(TIMESTEPS, np.float32),
        "latent_size": np.array([1, *size], np.float32),
        **prompts(rows),
    }
    return {tensor.name: known[tensor.name] for tensor in parts.specs["condition"].inputs}


def whole_model(variant: str, rows: NDArray[np.generic], timestep: float) -> NDArray[np.generic]:
    """Return diffusers' own output, by a call as the pipelines make it, which says sizes in pixels."""
    model, of_rows = random_pixart(VARIANTS[variant]), prompts(len(rows))
    pixels = 8 * torch.tensor([rows.shape[2:]] * len(rows), dtype=torch.float32)
    sizes = {"resolution": pixels, "aspect_ratio": pixels[:, :1] / pixels[:, 1:]}
    output: Tensor = model(
        torch.from_numpy(rows),
        encoder_hidden_states=torch.from_numpy(of_rows["prompt_embeddings"]),
        timestep=torch.full((len(rows),), timestep),
        encoder_attention_mask=torch.from_numpy(of_rows["prompt_mask"]),
        added_cond_kwargs=sizes if model.use_additional_conditions else {"resolution": None, "aspect_ratio": None},
    ).sample
    return output.numpy()


def chained(parts: Exported, latents: NDArray[np.generic], branches: int) -> tuple[Arrays, Arrays]:
    """Run the chain at the middle of three steps; return the head's results and all that a whole step would take."""
    batch, size = len(latents), latents.shape[2:]
    conditions = parts.run("condition", condition_inputs(parts, batch * branches, size))
    ones, step = np.ones(branches, np.float32), np.array([1])
    tokens = parts.run("embed", {"latents": latents, "branches": ones})["tokens"]
    for index, name in enumerate(name for name in parts.specs if name.startswith("block_")):
        known = {**conditions, "tokens": tokens, "modulation": conditions[f"modulation_{index:02d}"], "step": step}
        inputs = {tensor.name: known[tensor.name] for tensor in parts.specs[name].inputs}
        tokens = parts.run(name, inputs)["tokens_out"]
    draw = np.random.default_rng(5)
    weights = np.array([4.0, -3.0] if branches == 2 else [1.0], np.float32)
    known = {
        **conditions,
        "branches": ones,
        "step": step,
        "latents": latents,
        "guidance": np.repeat(weights[:, None], batch, axis=1),
        "coefficients": draw.uniform(0.2, 0.9, (3, 8)).astype(np.float32),
        "noise": draw.standard_normal(latents.shape).astype(np.float32),
        "carried": draw.standard_normal(latents.shape).astype(np.float32),
    }
    of_head = {**known, "tokens": tokens, "modulation": conditions["modulation_head"]}
    inputs = {tensor.name: of_head[tensor.name] for tensor in parts.specs["head"].inputs}
    return parts.run("head", inputs), known


@pytest.mark.parametrize("size", [*SIZES, (16, 16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_embed_is_diffusers_own_at_any_size(variant: str, size: tuple[int, int], exported: Export) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
    inputs = {"latents": latents, "branches": np.ones(2, np.float32)}
    tokens = exported(variant).run("embed", inputs)["tokens"]
    expected = random_pixart(VARIANTS[variant]).pos_embed(torch.from_numpy(latents)).numpy()
    assert relative_error(tokens, np.concatenate([expected, expected])) < 1e-5


def test_positions_stay_exact_in_half_precision(exported: Export) -> None:
    """A float16 phase of position 15 would be off by hundredths; only the sum is rounded."""
    latents = np.zeros((1, 4, 16, 16), np.float32)
    tokens = exported("alpha-1024", DType.FLOAT16).run(
        "embed", {"latents": latents, "branches": np.ones(1, np.float32)}
    )
    expected = random_pixart(ALPHA_1024).pos_embed(torch.from_numpy(latents)).numpy()
    assert relative_error(tokens["tokens"], expected) < 5e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_condition_is_diffusers_own(variant: str, exported: Export) -> None:
    model, rows, size = random_pixart(VARIANTS[variant]), 3, (12, 4)
    outputs = exported(variant).run("condition", condition_inputs(exported(variant), rows, size))
    pixels = torch.tensor([[96.0, 32.0]] * rows)
    sizes = {"resolution": pixels, "aspect_ratio": torch.full((rows, 1), 3.0)}
    added = sizes if model.use_additional_conditions else None
    embeddings = torch.from_numpy(prompts(rows)["prompt_embeddings"])
    context = embeddings if model.caption_projection is None else model.caption_projection(embeddings)
    assert relative_error(outputs["context"], context.numpy()) < 1e-4
    np.testing.assert_array_equal(outputs["context_bias"], np.where(prompts(rows)["prompt_mask"], 0, -10000))
    for step, timestep in enumerate(TIMESTEPS):
        shared, embedded = model.adaln_single(torch.full((rows,), timestep), added, rows, torch.float32)
        head = (model.scale_shift_table + embedded[:, None]).numpy()
        assert relative_error(outputs["modulation_head"][step], head) < 1e-4
        for index, block in enumerate(model.transformer_blocks):
            modulation = outputs[f"modulation_{index:02d}"][step]
            expected = (block.scale_shift_table + shared.reshape(rows, 6, -1)).numpy()
            assert relative_error(modulation[:, [0, 1, 2, 6, 7, 8]], expected) < 1e-4
            assert not modulation[:, 3:5].any()
            assert (modulation[:, 5] == 1).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_chain_of_parts_equals_the_whole_model(variant: str, size: tuple[int, int], exported: Export) -> None:
    latents = np.random.default_rng(1).standard_normal((2, 4, *size)).astype(np.float32)
    results, _ = chained(exported(variant), latents, 2)
    output = whole_model(variant, np.concatenate([latents, latents]), 500.0)[:, :4].reshape(2, 2, 4, *size)
    assert relative_error(results["model_output"], 4 * output[0] - 3 * output[1]) < 1e-4


@pytest.mark.parametrize("segment", [HALVES, 2])
@pytest.mark.parametrize("branches", [1, 2])
def test_other_granularities_are_the_same_model(segment: int, branches: int, exported: Export) -> None:
    latents = np.random.default_rng(2).standard_normal((1, 4, 8, 12)).astype(np.float32)
    results, _ = chained(exported("alpha-1024", segment=segment), latents, branches)
    expected, _ = chained(exported("alpha-1024"), latents, branches)
    for name, value in expected.items():
        assert relative_error(results[name], value) < 1e-5


def test_the_learned_variance_is_not_used(exported: Export) -> None:
    """As in diffusers' pipelines: the noise column of the table is the standard deviation."""
    latents = np.random.default_rng(3).standard_normal((1, 4, 8, 8)).astype(np.float32)
    results, known = chained(exported("sigma-1024"), latents, 1)
    of_latents, of_output, of_noise, _, _, of_carried, _, _ = known["coefficients"][1]
    expected = of_latents * latents + of_output * results["model_output"] + of_carried * known["carried"]
    assert relative_error(results["latents_out"], expected + of_noise * known["noise"]) < 1e-6


def test_the_monolithic_step_equals_the_chain(exported: Export) -> None:
    parts = exported("alpha-1024")
    results, known = chained(parts, np.random.default_rng(4).standard_normal((2, 4, 4, 8)).astype(np.float32), 2)
    step = parts.run("step", {tensor.name: known[tensor.name] for tensor in parts.specs["step"].inputs})
    for name, value in results.items():
        assert relative_error(step[name], value) < 1e-5


def test_a_reused_units_sum_is_the_blocks_residual(exported: Export) -> None:
    """What the caches rely on, with a gate of one for the cross-attention."""
    parts = exported("alpha-1024")
    draw = np.random.default_rng(6)
    conditions = parts.run("condition", condition_inputs(parts, 2, (8, 8)))
    tokens, modulation = draw.standard_normal((2, 16, 48)).astype(np.float32), conditions["modulation_01"]
    context = {name: conditions[name] for name in ("context", "context_bias")}
    inputs = {"tokens": tokens, "modulation": modulation, "step": np.array([2]), **context}
    outputs = parts.run("block_01", inputs)
    rows = modulation[2]
    expected = tokens + rows[:, 2:3] * outputs["attention_0"] + outputs["cross_attention_0"]
    assert relative_error(outputs["tokens_out"], expected + rows[:, 8:9] * outputs["mlp_0"]) < 1e-6


@pytest.mark.parametrize("name", ["embed", "condition", "block_00", "head"])
def test_a_part_in_half_precision_is_the_part_in_pytorch(name: str, exported: Export) -> None:
    parts, draw = exported("alpha-1024", DType.FLOAT16), np.random.default_rng(7)
    sizes = {"batch": 1, "branches": 2, "rows": 2, "steps": 3, "height": 12, "width": 8, "tokens": 24}
    random = {each.name: draw.standard_normal(each.resolved(sizes)) for each in parts.specs[name].inputs}
    fixed = {
        **condition_inputs(parts, 2, (12, 8)),
        "branches": np.ones(2),
        "step": np.array([1]),
        "context_bias": np.where(prompts(2)["prompt_mask"], 0, -10000),
    }
    values = {**random, **{key: value for key, value in fixed.items() if key in random}}
    inputs = {each.name: values[each.name].astype(each.dtype.numpy) for each in parts.specs[name].inputs}
    module = reference_modules(loaded_pixart(random_pixart(ALPHA_1024)))[name]
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    expected = module(**{key: value.float() if value.is_floating_point() else value for key, value in tensors.items()})
    actual = parts.run(name, inputs)
    for tensor, value in zip(parts.specs[name].outputs, expected, strict=True):
        assert relative_error(actual[tensor.name], value.numpy()) < 2e-2, tensor.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_is_called_as_the_pipelines_call_it(variant: str) -> None:
    latents = np.random.default_rng(8).standard_normal((3, 4, 12, 4)).astype(np.float32)
    conditions = {name: torch.from_numpy(value) for name, value in prompts(3).items()}
    output = adapted(random_pixart(VARIANTS[variant])).predict(
        torch.from_numpy(latents), torch.full((3,), 500.0), conditions
    )
    np.testing.assert_array_equal(output.numpy(), whole_model(variant, latents, 500.0)[:, :4])
