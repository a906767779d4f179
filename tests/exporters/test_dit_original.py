"""Invariant: the original layout and diffusers' hold the same model, proven against an independent implementation."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters import (
    diffusers_from_original,
    load_checkpoint,
    original_from_diffusers,
    reference_modules,
)
from adacorr_deploy.exporters.dit_original import ORIGINAL_SIZES, set_frequency_shift
from tests.exporters.conftest import loaded, random_dit

if TYPE_CHECKING:
    from dit import DiT

ORACLE = {"side": 8, "patch": 2, "channels": 4, "out_channels": 8, "width": 64, "depth": 3, "heads": 2, "classes": 10}


def random_original(oracle: ModuleType, *, freq_shift: int = 0) -> DiT:
    torch.manual_seed(1)
    model: DiT = oracle.DiT(**ORACLE, freq_shift=freq_shift)
    for name, weight in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval().requires_grad_(False)


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 8, 8, generator=draw), torch.tensor([999.0, 432.0, 1.0]), torch.tensor([0, 7, 10])


def test_the_converted_original_computes_what_the_original_computes(oracle: ModuleType) -> None:
    original = random_original(oracle)
    converted = diffusers_from_original(original.state_dict(), where="test", heads=2)
    torch.testing.assert_close(converted(*example()).sample, original(*example()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("freq_shift", [0, 1])
def test_the_timestep_frequencies_are_the_models_own(oracle: ModuleType, freq_shift: int) -> None:
    """The trap: with the other frequencies the outputs differ by far more than rounding."""
    original = random_original(oracle, freq_shift=freq_shift)
    converted = diffusers_from_original(original.state_dict(), where="test", heads=2)
    set_frequency_shift(converted, freq_shift)
    _, timesteps, labels = example()
    modulation, *_ = reference_modules(loaded(converted))["condition"](timesteps=timesteps, labels=labels)
    condition = original.t_embedder(timesteps)[:, None] + original.y_embedder(labels)[None]
    expected = original.blocks.get_submodule("0.adaLN_modulation")(condition).reshape(3, 3, 6, 64)
    torch.testing.assert_close(modulation, expected, rtol=1e-4, atol=1e-5)
    set_frequency_shift(converted, 1 - freq_shift)
    other, *_ = reference_modules(loaded(converted))["condition"](timesteps=timesteps, labels=labels)
    assert (other - expected).abs().max() > 1e-2


def test_a_diffusers_model_in_the_original_layout_computes_the_same(oracle: ModuleType) -> None:
    model = random_dit()
    original = random_original(oracle, freq_shift=1)
    original.load_state_dict(original_from_diffusers(model))
    torch.testing.assert_close(original(*example()), model(*example()).sample, rtol=1e-4, atol=2e-5)


def test_there_and_back_again_changes_no_weight(oracle: ModuleType) -> None:
    state = random_original(oracle).state_dict()
    back = original_from_diffusers(diffusers_from_original(state, where="test", heads=2))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


@pytest.mark.parametrize("form", ["bare.pt", "ema.pt", "bare.safetensors"])
def test_every_form_of_file_is_loaded(form: str, oracle: ModuleType, tmp_path: Path) -> None:
    state = random_original(oracle).state_dict()
    path = tmp_path / form
    if form.endswith(".safetensors"):
        save_file(state, path)
    else:
        wrong = {key: value + 1 for key, value in state.items()}
        torch.save(state if form == "bare.pt" else {"model": wrong, "ema": state, "step": 3}, path)
    model = load_checkpoint(path, heads=2)
    assert model.name == path.stem
    assert isinstance(model.schedule, NoiseSchedule)
    assert model.schedule.variance_type == "learned_range"
    assert len(model.schedule.betas) == 1000
    assert (model.schedule.betas[0], model.schedule.betas[-1]) == pytest.approx((1e-4, 0.02))
    spec = model.model.spec(DType.FLOAT32, 1)
    assert (spec.latent_shape, spec.tokens, spec.width, spec.num_classes) == ((4, 8, 8), 16, 64, 10)
    assert spec.learned_variance
    images, timesteps, labels = example()
    expected = random_original(oracle)(images, timesteps, labels)
    torch.testing.assert_close(model.model.module(images, timesteps, labels).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "patch"), [((1152, 28), 2), ((1024, 24), 4), ((768, 12), 8), ((384, 12), 2)])
def test_the_paper_sizes_are_known_by_their_shapes(size: tuple[int, int], patch: int, oracle: ModuleType) -> None:
    from adacorr_deploy.exporters.dit_original import _config_from_shapes

    width, depth = size
    with torch.device("meta"):
        shapes = {**ORACLE, "side": 32, "patch": patch, "width": width, "depth": depth, "heads": 1, "classes": 1000}
        state = oracle.DiT(**shapes, freq_shift=0).state_dict()
    config = _config_from_shapes(state, where="test", heads=None)
    assert config.num_attention_heads == ORIGINAL_SIZES[size][1]
    assert (config.width, config.num_layers, config.patch_size, config.sample_size) == (width, depth, patch, 32)
    assert (config.in_channels, config.out_channels, config.num_embeds_ada_norm) == (4, 8, 1000)


def test_an_unknown_size_needs_its_heads(oracle: ModuleType) -> None:
    with pytest.raises(UnsupportedModelError, match=r"width 64 and 3 blocks .* XL \(1152×28\), L .* heads.* --heads N"):
        diffusers_from_original(random_original(oracle).state_dict(), where="here")


def test_heads_must_divide_the_width(oracle: ModuleType) -> None:
    with pytest.raises(UnsupportedModelError, match="5 attention heads don't divide the width 64"):
        diffusers_from_original(random_original(oracle).state_dict(), where="here", heads=5)


def test_missing_and_unexpected_keys_are_counted_and_named(oracle: ModuleType) -> None:
    state = random_original(oracle).state_dict()
    for index in range(3):
        state[f"blocks.{index}.mlp.fc9.weight"] = state.pop(f"blocks.{index}.mlp.fc1.weight")
        state[f"blocks.{index}.mlp.fc9.bias"] = state.pop(f"blocks.{index}.mlp.fc1.bias")
    message = r"here .* 6 missing: blocks\.0\.mlp\.fc1\.weight.* and 3 more; 6 unexpected: blocks\.0\.mlp\.fc9"
    with pytest.raises(CheckpointError, match=message):
        diffusers_from_original(state, where="here", heads=2)
