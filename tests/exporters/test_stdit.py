"""Invariant: STDiT's parts, in PyTorch, compute what the whole module computes, and only its checkpoints load."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.schedules import FlowSchedule
from adacorr_deploy.core.specs import HALVES, DType
from adacorr_deploy.exporters.adapter import EXPORTERS
from adacorr_deploy.exporters.stdit import STDiT, STDiTSize, grid_positions, rotated, rotation_frequencies
from adacorr_deploy.exporters.stdit_adapter import STDiTAdapter, STDiTModel
from tests.exporters.clips import Chain, latents_of, random_prompts, relative_error
from tests.exporters.random_stdit import SIZE, random_stdit

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def stdit() -> STDiT:
    return random_stdit()


def conditions_of(lengths: list[int], rates: list[float]) -> dict[str, Tensor]:
    """Random prompts of so many rows, of which the first `lengths` tokens are real, and frame rates."""
    prompts = random_prompts(lengths, tokens=SIZE.prompt_tokens, width=SIZE.prompt_width)
    return {**prompts, "frame_rate": torch.tensor(rates)}


@pytest.mark.parametrize("segment", [HALVES, 1, 2, 3])
@pytest.mark.parametrize(("batch", "branches"), [(1, 1), (2, 2)])
def test_the_chain_of_parts_equals_the_whole_model(segment: int, batch: int, branches: int, stdit: STDiT) -> None:
    rows, model = batch * branches, STDiTModel(stdit)
    latents = latents_of(batch, 3, 8, 8)
    conditions = conditions_of([4, 10, 1, 7][:rows], [24.0, 8.0, 24.0, 8.0][:rows])
    timesteps = torch.tensor([1000.0, 512.25, 3.0])
    output, _ = Chain(model, segment).model_output(latents, timesteps, 1, conditions, branches)
    clips = latents.repeat(branches, 1, 1, 1, 1)
    expected = model.predict(clips, timesteps[1].expand(rows), conditions)
    assert relative_error(output, expected) < TOLERANCE


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 8, 8), (2, 4, 10), (7, 6, 2)])
def test_clips_of_any_size_are_followed(frames: int, height: int, width: int, stdit: STDiT) -> None:
    latents, conditions, model = latents_of(1, frames, height, width), conditions_of([4], [24.0]), STDiTModel(stdit)
    output, _ = Chain(model, 1).model_output(latents, torch.tensor([700.0]), 0, conditions, 1)
    assert relative_error(output, model.predict(latents, torch.tensor([700.0]), conditions)) < TOLERANCE


def test_what_flow_matching_is_given_has_the_other_sign_and_no_variance(stdit: STDiT) -> None:
    """The original predicts clip − noise; everything else here takes noise − clip."""
    latents, conditions = latents_of(1, 2, 4, 4), conditions_of([4], [24.0])
    raw = stdit(latents, torch.tensor([700.0]), *(conditions[name] for name in conditions))
    assert raw.shape[1] == 8
    assert torch.equal(STDiTModel(stdit).predict(latents, torch.tensor([700.0]), conditions), -raw[:, :4])
    assert not STDiTModel(stdit).learned_variance


def test_a_masked_prompt_is_a_shorter_one(stdit: STDiT) -> None:
    """As the original has it, which drops the padding before it attends."""
    latents, conditions = latents_of(1, 2, 4, 4), conditions_of([4], [24.0])
    short = {name: value[:, :4] if value.ndim > 1 else value for name, value in conditions.items()}
    model = STDiTModel(stdit)
    expected = model.predict(latents, torch.tensor([700.0]), short)
    assert relative_error(model.predict(latents, torch.tensor([700.0]), conditions), expected) < 1e-6


@pytest.mark.parametrize("change", [lambda c: c["frame_rate"].mul_(3), lambda c: c["prompt_mask"][:, 5].fill_(1)])
def test_rate_and_mask_matter(change: Callable[[Mapping[str, Tensor]], object], stdit: STDiT) -> None:
    latents, conditions, model = latents_of(1, 2, 4, 4), conditions_of([4], [24.0]), STDiTModel(stdit)
    before = model.predict(latents, torch.tensor([700.0]), conditions)
    change(conditions)
    assert relative_error(model.predict(latents, torch.tensor([700.0]), conditions), before) > 1e-3


def test_frames_are_told_apart_by_their_order_alone(stdit: STDiT) -> None:
    """By the rotation: frames in reverse are another clip, and without it they would be the same one in reverse."""
    latents, conditions, model = latents_of(1, 3, 4, 4), conditions_of([4], [24.0]), STDiTModel(stdit)
    forwards = model.predict(latents, torch.tensor([700.0]), conditions)
    backwards = model.predict(latents.flip(2), torch.tensor([700.0]), conditions).flip(2)
    assert relative_error(backwards, forwards) > 1e-3
    unrotated = random_stdit()
    unrotated.rope.freqs.zero_()
    forwards = unrotated(latents, torch.tensor([700.0]), *conditions.values())
    backwards = unrotated(latents.flip(2), torch.tensor([700.0]), *conditions.values()).flip(2)
    assert relative_error(backwards, forwards) < 1e-5


def test_a_rotation_keeps_products_of_equal_distance() -> None:
    """The definition of rotary positions (arXiv 2104.09864): ⟨R(m)q, R(n)k⟩ depends on m − n."""
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(3))
    angles = torch.arange(9.0)[:, None] * rotation_frequencies(16)

    def product(m: int, n: int) -> float:
        return float((rotated(query, angles[m : m + 1]) * rotated(key, angles[n : n + 1])).sum())

    assert product(5, 3) == pytest.approx(product(8, 6), abs=1e-5)
    assert product(5, 3) != pytest.approx(product(8, 3), abs=1e-3)
    assert product(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (4, 4), (15, 27)])
def test_positions_span_the_same_at_any_resolution(rows: int, columns: int) -> None:
    """Written out in NumPy: a frame as large as the base's has positions 0, 1, …; another's are stretched to it."""
    side = 16 * (rows * columns) ** 0.5  # pixels of a square frame of as many patches
    stretch = round((rows * columns) ** 0.5) / (side / 512)
    frequencies = 10000 ** -(np.arange(0, 24, 2) / 24)
    expected = []
    for row in range(rows):
        for column in range(columns):
            across, down = column * stretch / columns * frequencies, row * stretch / rows * frequencies
            expected.append(np.concatenate([np.sin(across), np.cos(across), np.sin(down), np.cos(down)]))
    np.testing.assert_allclose(grid_positions(rows, columns, SIZE, 512).numpy(), np.stack(expected), atol=2e-5)


def test_spatial_and_temporal_blocks_alternate(stdit: STDiT) -> None:
    spec = STDiTModel(stdit).spec(DType.FLOAT32, 1)
    spatial, temporal = ("attention", "cross_attention", "mlp"), ("temporal_attention", "cross_attention", "mlp")
    assert spec.blocks == (spatial, temporal) * 2


@pytest.mark.parametrize(
    "size",
    [
        SIZE,
        STDiTSize(width=32, heads=1, depth=1, patch=4, channels=3, out_channels=3, prompt_width=8, prompt_tokens=5),
        STDiTSize(width=64, heads=4, depth=3, patch=1, channels=4, out_channels=8, prompt_width=8, prompt_tokens=5),
    ],
)
def test_a_checkpoints_shapes_tell_its_size(size: STDiTSize) -> None:
    adapter, model = STDiTAdapter(), random_stdit(size)
    assert adapter.is_original(model.state_dict())
    loaded = adapter.from_original(model.state_dict(), where="x", heads=None)
    assert loaded.module.size == size
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value)


def test_a_full_size_checkpoint_has_the_published_shapes() -> None:
    """The names and numbers of hpcai-tech/OpenSora-STDiT-v3, from its code's configuration."""
    size = STDiTSize(
        width=1152, heads=16, depth=28, patch=2, channels=4, out_channels=8, prompt_width=4096, prompt_tokens=300
    )
    with torch.device("meta"):
        state = STDiT(size).state_dict()
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 1, 2, 2)
    assert state["spatial_blocks.27.attn.q_norm.weight"].shape == (72,)
    assert state["temporal_blocks.0.cross_attn.kv_linear.weight"].shape == (2304, 1152)
    assert state["rope.freqs"].shape == (36,)
    assert state["y_embedder.y_embedding"].shape == (300, 4096)
    assert state["final_layer.linear.bias"].shape == (32,)
    assert sum(value.numel() for value in state.values()) == 1_208_872_772


def test_the_schedule_is_open_soras(stdit: STDiT) -> None:
    assert STDiTModel(stdit).training_schedule() == FlowSchedule(flow_steps=1000, unshifted_tokens=1024)


def test_no_other_family_takes_its_checkpoints(stdit: STDiT) -> None:
    claiming = [adapter.family for adapter in EXPORTERS.values() if adapter.is_original(stdit.state_dict())]
    assert claiming == ["stdit"]


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("rope.freqs", None, CheckpointError, "x lacks rope.freqs, which STDiT"),
        ("spatial_blocks.1.attn.q_norm.weight", None, CheckpointError, "1 missing: spatial_blocks.1.attn.q_norm"),
        ("rope.freqs", torch.ones(5), UnsupportedModelError, "5 rotary frequencies"),
        ("x_embedder.proj.weight", torch.ones(48, 4, 2, 2, 2), UnsupportedModelError, "patches are of one frame"),
        ("final_layer.linear.weight", torch.ones(24, 48), UnsupportedModelError, "6 output channels are neither the 4"),
        ("t_block.1.bias", torch.full((288,), torch.nan), CheckpointError, "t_block.1.bias holds NaN"),
        ("extra", torch.ones(1), CheckpointError, "1 unexpected: extra"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused(
    key: str, value: Tensor | None, error: type[Exception], message: str, stdit: STDiT
) -> None:
    state = without(stdit.state_dict(), key)
    with pytest.raises(error, match=message):
        STDiTAdapter().from_original(state if value is None else {**state, key: value}, where="x", heads=None)


def test_heads_can_only_agree(stdit: STDiT) -> None:
    STDiTAdapter().from_original(stdit.state_dict(), where="x", heads=2)
    with pytest.raises(UnsupportedModelError, match="--heads is 3, but its rotary frequencies are of 2"):
        STDiTAdapter().from_original(stdit.state_dict(), where="x", heads=3)
