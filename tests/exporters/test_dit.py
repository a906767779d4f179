"""Invariant: the parts, in PyTorch and in ONNX Runtime, compute what diffusers' own model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor

from adacorr_deploy.core.specs import HALVES, DType, PartSpec
from adacorr_deploy.exporters import reference_modules
from adacorr_deploy.exporters.dit import ConditionModule, embedders_agree
from adacorr_deploy.exporters.family_parts import ConditionPart
from tests.exporters.conftest import Arrays, Exported, loaded, random_dit

Export = Callable[[DType, int], Exported]
NULL_LABEL = 10


def random_inputs(
    spec: PartSpec, *, batch: int, branches: int, steps: int, seed: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Random values for every input of a part, in the contract's types."""
    draw = np.random.default_rng(seed)
    sizes = {"batch": batch, "branches": branches, "rows": batch * branches, "steps": steps}
    values: dict[str, NDArray[np.generic]] = {}
    for tensor in spec.inputs:
        shape = tensor.resolved(sizes)
        values[tensor.name] = draw.standard_normal(shape).astype(tensor.dtype.numpy)
    fixed: dict[str, NDArray[np.generic]] = {
        "branches": np.ones(branches, np.float32),
        "step": np.array([steps - 1], np.int64),
        "labels": draw.integers(0, NULL_LABEL + 1, batch * branches),
        "timesteps": np.linspace(999, 0, steps, dtype=np.float32),
    }
    return values | {name: value for name, value in fixed.items() if name in values}


def in_torch(module: torch.nn.Module, inputs: Arrays, spec: PartSpec) -> dict[str, NDArray[np.generic]]:
    """Run a reference part in float32."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    outputs = module(**{name: value.float() if value.is_floating_point() else value for name, value in tensors.items()})
    return {tensor.name: output.numpy() for tensor, output in zip(spec.outputs, outputs, strict=True)}


def relative_error(actual: NDArray[np.generic], expected: NDArray[np.generic]) -> float:
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("precision", "tolerance"), [(DType.FLOAT32, 1e-4), (DType.FLOAT16, 2e-2)])
@pytest.mark.parametrize("name", ["embed", "condition", "block_00", "block_02", "head"])
def test_a_part_in_onnx_runtime_equals_the_part_in_pytorch(
    name: str, precision: DType, tolerance: float, dit: DiTTransformer2DModel, exported: Export
) -> None:
    parts = exported(precision, 1)
    spec = parts.specs[name]
    inputs = random_inputs(spec, batch=2, branches=2, steps=3)
    expected = in_torch(reference_modules(loaded(dit))[name], inputs, spec)
    actual = parts.run(name, inputs)
    assert list(actual) == [tensor.name for tensor in spec.outputs]
    for tensor in spec.outputs:
        assert actual[tensor.name].dtype == tensor.dtype.numpy
        assert actual[tensor.name].shape == expected[tensor.name].shape
        assert relative_error(actual[tensor.name], expected[tensor.name]) < tolerance, tensor.name


def chained(
    parts: Exported, latents: NDArray[np.generic], timesteps: list[float], labels: list[int], step: int
) -> tuple[NDArray[np.generic], Mapping[str, NDArray[np.generic]]]:
    """Run embed, condition and the blocks as the runtime does; return the last tokens and the modulations."""
    branches = len(labels) // len(latents)
    conditions: Arrays = {"timesteps": np.array(timesteps, np.float32), "labels": np.array(labels, np.int64)}
    modulations = parts.run("condition", conditions)
    tokens = parts.run("embed", {"latents": latents, "branches": np.ones(branches, np.float32)})["tokens"]
    for index, name in enumerate(name for name in parts.specs if name.startswith("block_")):
        inputs = {"tokens": tokens, "modulation": modulations[f"modulation_{index:02d}"], "step": np.array([step])}
        tokens = parts.run(name, inputs)["tokens_out"]
    return tokens, modulations


def guided_step(
    parts: Exported, latents: NDArray[np.generic], guidance: NDArray[np.generic], labels: list[int]
) -> tuple[Mapping[str, NDArray[np.generic]], Arrays]:
    """Run the chain with its head at the middle one of three steps; return its results and the head's inputs."""
    tokens, modulations = chained(parts, latents, [900.0, 500.0, 20.0], labels, 1)
    draw = np.random.default_rng(5)
    inputs = {
        "tokens": tokens,
        "modulation": modulations["modulation_head"],
        "step": np.array([1]),
        "latents": latents,
        "guidance": guidance,
        "coefficients": draw.uniform(0.2, 0.9, (3, 8)).astype(np.float32),
        "noise": draw.standard_normal(latents.shape).astype(np.float32),
        "carried": draw.standard_normal(latents.shape).astype(np.float32),
    }
    return parts.run("head", inputs), {**inputs, **modulations}


@pytest.mark.parametrize(("batch", "branches"), [(1, 1), (3, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("segment", [HALVES, 1, 2])
def test_the_chain_of_parts_equals_the_whole_model(
    batch: int, branches: int, segment: int, dit: DiTTransformer2DModel, exported: Export
) -> None:
    latents = np.random.default_rng(batch).standard_normal((batch, 4, 8, 8), np.float32)
    labels = [*range(batch), *([NULL_LABEL] * batch * (branches - 1))]
    weights = np.array([[4.0], [-3.0]], np.float32) if branches == 2 else np.array([[1.0]], np.float32)
    guidance = np.repeat(weights, batch, axis=1)
    results, head = guided_step(exported(DType.FLOAT32, segment), latents, guidance, labels)

    rows = torch.from_numpy(np.concatenate([latents] * branches))
    output: Tensor = dit(rows, torch.full((len(rows),), 500.0), torch.tensor(labels)).sample
    noise_of_branch, variance = output[:, :4].reshape(branches, batch, 4, 8, 8), output[:batch, 4:].numpy()
    guided = (torch.from_numpy(weights)[:, :, None, None, None] * noise_of_branch).sum(0).numpy()
    assert relative_error(results["model_output"], guided) < 1e-4
    of_latents, of_output, of_noise, low, high, of_carried, kept, moved = head["coefficients"][1]
    deviation = np.exp(0.5 * (low + (variance + 1) / 2 * (high - low)))
    noise, carried = of_noise * deviation * head["noise"], of_carried * head["carried"]
    assert relative_error(results["latents_out"], of_latents * latents + of_output * guided + carried + noise) < 1e-4
    assert relative_error(results["carried_out"], kept * latents + moved * guided) < 1e-4


def test_the_monolithic_step_equals_the_chain(exported: Export) -> None:
    parts = exported(DType.FLOAT32, 1)
    latents = np.random.default_rng(7).standard_normal((2, 4, 8, 8), np.float32)
    guidance = np.array([[4, 4], [-3, -3]], np.float32)
    results, head = guided_step(parts, latents, guidance, [1, 2, NULL_LABEL, NULL_LABEL])
    names = {tensor.name for tensor in parts.specs["step"].inputs}
    inputs = {**head, "branches": np.ones(2, np.float32)}
    step = parts.run("step", {name: value for name, value in inputs.items() if name in names})
    for name, value in results.items():
        assert relative_error(step[name], value) < 1e-5


def test_a_reused_units_sum_is_the_blocks_residual(exported: Export) -> None:
    """What the caches rely on: tokens_out = tokens + gate_msa · attention_0 + gate_mlp · mlp_0."""
    parts = exported(DType.FLOAT32, 1)
    inputs = random_inputs(parts.specs["block_01"], batch=2, branches=1, steps=4)
    outputs = parts.run("block_01", inputs)
    rows = inputs["modulation"][3]
    expected = inputs["tokens"] + rows[:, 2:3] * outputs["attention_0"] + rows[:, 5:6] * outputs["mlp_0"]
    assert relative_error(outputs["tokens_out"], expected) < 1e-6


def test_without_learned_variance_the_noise_column_is_the_standard_deviation() -> None:
    head = reference_modules(loaded(random_dit(learned_variance=False)))["head"]
    spec = next(part.spec for part in loaded(random_dit()).parts(DType.FLOAT32, 1) if part.spec.name == "head")
    inputs = random_inputs(spec, batch=2, branches=1, steps=2)
    results = in_torch(head, inputs, spec)
    of_latents, of_output, of_noise, _, _, of_carried, _, _ = inputs["coefficients"][1]
    expected = of_latents * inputs["latents"] + of_output * results["model_output"] + of_carried * inputs["carried"]
    expected = expected + of_noise * inputs["noise"]
    assert relative_error(results["latents_out"], expected) < 1e-6


@pytest.mark.parametrize("units", [(1,) * 6, (2, 2, 2), (4, 2)])
def test_blocks_with_embedders_of_their_own_are_conditioned_by_their_own(units: tuple[int, ...]) -> None:
    model = random_dit()
    assert embedders_agree(model)
    for index, block in enumerate(model.transformer_blocks):
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.1 * (index + 1))
    assert not embedders_agree(model)
    blocks = list(model.transformer_blocks)
    condition = ConditionPart(ConditionModule(model), blocks=len(blocks), units=units)
    timesteps, labels = torch.tensor([700.0, 3.0]), torch.tensor([4, NULL_LABEL])
    *modulations, head = condition(timesteps=timesteps, labels=labels)
    of_blocks = torch.cat(modulations, dim=2)
    assert head.shape == (2, 2, 2, 64)
    for index, block in enumerate(blocks):
        embedded = block.norm1.emb(timesteps[1:].expand(2), labels, hidden_dtype=torch.float32)
        expected = block.norm1.linear(torch.nn.functional.silu(embedded)).reshape(2, 6, 64)
        torch.testing.assert_close(of_blocks[1, :, 6 * index : 6 * index + 6], expected, rtol=1e-5, atol=1e-6)
