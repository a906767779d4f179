"""The same decisions as public reference code, driven on the same recorded signals.

The references run as they are published: diffusers' hooks on a small PyTorch model, cache-dit's decision functions.
Ours see signals measured on the tensors that the references saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.mag_cache import MagCacheConfig, apply_mag_cache
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig, TaylorSeerState, apply_taylorseer_cache
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from adacorr_deploy.caching.decisions import Signals
from adacorr_deploy.caching.gates.accumulated import MagCacheGate
from adacorr_deploy.caching.granularity import Granularity, Spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PRESETS, policy_named
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from tests.caching.driven import Driven, drive, made
from tests.caching.scripted_profile import profile

STEPS, WIDTH = 30, 8


class Block(nn.Module):
    """Adds a bounded map of its input, and counts how often it is really run."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.normal_(self.map.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
        self.runs = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.runs += 1
        added: Tensor = torch.tanh(self.map(hidden_states))
        return hidden_states + added


class Model(nn.Module, CacheMixin):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = [Block(seed) for seed in range(blocks)]
        self.transformer_blocks = nn.ModuleList(self.blocks)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.fixture(autouse=True)
def _registered() -> None:
    TransformerBlockRegistry.register(
        Block, TransformerBlockMetadata(return_hidden_states_index=None, hidden_states_argument_name="hidden_states")
    )


def trajectory(seed: int, *, stride: float) -> list[Tensor]:
    """Inputs that move by steps of uneven length."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(2, 5, WIDTH, generator=generator)]
    for _ in range(STEPS - 1):
        length = stride * float(torch.rand((), generator=generator))
        inputs.append(inputs[-1] + length * torch.randn(2, 5, WIDTH, generator=generator))
    return inputs


def evaluated(model: Model, inputs: Sequence[Tensor], block: int) -> list[int]:
    """Run the hooked model, and return the steps at which a block was really run."""
    steps, probe = [], model.blocks[block]
    with torch.no_grad(), CacheMixin.cache_context(model, "run"):
        for step, tokens in enumerate(inputs):
            before = probe.runs
            model(tokens)
            if probe.runs > before:
                steps.append(step)
    return steps


def compared(now: Tensor, before: Tensor) -> list[Signals]:
    """What the signals part measures of a batch that counts as one image."""
    change, offset = now - before, float((now - before).norm() / before.norm())
    signals = Signals(
        relative_offset=offset,
        relative_offset_p95=offset,
        spatial_change=0.0,
        paper_temporal=0.0,
        paper_spatial=0.0,
        change_l1=float(change.abs().mean()),
        reference_l1=float(before.abs().mean()),
        change_square=float(change.square().mean()),
        reference_square=float(before.square().mean()),
    )
    return [signals]


def first_residuals(inputs: Sequence[Tensor]) -> list[Tensor]:
    block = Block(0)
    with torch.no_grad():
        return [block(tokens) - tokens for tokens in inputs]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_fbcache_evaluates_where_diffusers_hook_does(seed: int, threshold: float) -> None:
    inputs = trajectory(seed, stride=0.15)
    residuals, hooked, found = first_residuals(inputs), Model(), Driven()
    apply_first_block_cache(hooked, FirstBlockCacheConfig(threshold=threshold))
    drive(
        made(policy_named(f"fbcache@{threshold}"), steps=STEPS, blocks=3),
        STEPS,
        signals=lambda step, span: compared(residuals[step], residuals[found.evaluated(1)[-1]]),
        into=found,
    )
    assert found.evaluated(1) == evaluated(hooked, inputs, 1)
    assert 1 < len(found.evaluated(1)) < STEPS


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("threshold", "max_skipped", "retention"), [(0.06, 3, 0.2), (0.2, 5, 0.1), (0.01, 1, 0.0)])
def test_magcache_evaluates_where_diffusers_hook_does(
    seed: int, threshold: float, max_skipped: int, retention: float
) -> None:
    noise = torch.rand(STEPS, generator=torch.Generator().manual_seed(seed)).tolist()
    ratios = [1.0, *(0.95 + 0.08 * value for value in noise[1:])]
    hooked = Model()
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skipped,
        retention_ratio=retention,
        num_inference_steps=STEPS,
        mag_ratios=ratios,
    )
    apply_mag_cache(hooked, config)
    expected = evaluated(hooked, trajectory(seed, stride=0.1), 1)
    gate = MagCacheGate(threshold=threshold, max_skipped=max_skipped, retention=retention)
    measured = profile(steps=STEPS).model_copy(update={"magnitude_ratios": tuple(ratios)})
    policy = PRESETS["magcache"].model_copy(update={"gate": gate})
    assert drive(made(policy, steps=STEPS, profile=measured), STEPS).evaluated() == expected
    assert 1 < len(expected) < STEPS


@pytest.mark.parametrize(("interval", "first"), [(5, 3), (3, 1), (4, 6)])
def test_taylorseer_evaluates_where_diffusers_hook_does(interval: int, first: int) -> None:
    hooked = Model()
    config = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=first, cache_identifiers=["transformer_blocks.1"]
    )
    apply_taylorseer_cache(hooked, config)
    base = policy_named(f"taylorseer@{interval}")
    offset = base.gate.model_copy(update={"offset": (first + 1) % interval})
    policy = base.model_copy(
        update={"gate": offset, "guards": Guards(warmup_steps=first, final_steps=0, max_age_steps=99)}
    )
    found = drive(made(policy, steps=STEPS), STEPS).evaluated()
    assert found == evaluated(hooked, trajectory(0, stride=0.1), 1)


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_predicts_what_diffusers_state_does(order: int) -> None:
    """Over evaluations that lie unevenly apart: recursive differences are no polynomial there."""
    values = torch.rand(20, generator=torch.Generator().manual_seed(order), dtype=torch.float64)
    state = TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=order)
    predictor = Predictor(kind=PredictorKind.RESIDUAL_TAYLOR, order=order)
    filled: list[int] = []
    for step in range(20):
        state.current_step = step
        if step in {0, 1, 4, 6, 11, 12, 17}:
            state.update((values[step : step + 1],))
            filled.insert(0, step)
            continue
        coefficients = predictor.prediction(step, filled).coefficients
        ours = sum(c * float(values[at]) for c, at in zip(coefficients, filled, strict=False))
        if len(filled) > order:
            assert ours == pytest.approx(float(state.predict()[0]), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("threshold", "limit", "in_a_row"), [(0.1, -1, -1), (0.3, -1, 3), (0.3, 7, 2)])
def test_dbcache_evaluates_where_cache_dits_manager_does(
    seed: int, threshold: float, limit: int, in_a_row: int
) -> None:
    """Its manager decides on the residuals of the first blocks that the hooks would have given it."""
    pytest.importorskip("cache_dit", reason="an extra of its own: pip install '.[bench]'")
    from cache_dit import DBCacheConfig
    from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager

    config = DBCacheConfig(
        Fn_compute_blocks=1,
        residual_diff_threshold=threshold,
        max_warmup_steps=4,
        max_cached_steps=limit,
        max_continuous_cached_steps=in_a_row,
    )
    manager, residuals = CachedContextManager("manager"), first_residuals(trajectory(seed, stride=0.15))
    manager.set_context(manager.new_context(name="blocks", cache_config=config))
    expected = []
    for step, residual in enumerate(residuals):
        manager.mark_step_begin()
        if manager.can_cache(residual, prefix="Fn_residual"):
            manager.add_cached_step()
        else:
            manager.set_Fn_buffer(residual, prefix="Fn_residual")
            expected.append(step)
    base, found = policy_named(f"fbcache@{threshold}"), Driven()
    gate = base.gate.model_copy(update={"max_reused_steps": limit if limit >= 0 else None})
    guards = Guards(warmup_steps=4, final_steps=0, max_age_steps=in_a_row if in_a_row > 0 else 1000)
    drive(
        made(base.model_copy(update={"gate": gate, "guards": guards}), steps=STEPS, blocks=3),
        STEPS,
        signals=lambda step, span: compared(residuals[step], residuals[found.evaluated(1)[-1]]),
        into=found,
    )
    assert found.evaluated(1) == expected
    assert 4 < len(expected) < STEPS


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("threshold", "dynamic"), [(0.08, False), (0.2, False), (0.08, True), (0.15, True)])
def test_dbprune_evaluates_where_cache_dits_manager_does(seed: int, threshold: float, dynamic: bool) -> None:
    """Its manager decides on each block's input, which the pruned blocks' hooks would have given it."""
    pytest.importorskip("cache_dit", reason="an extra of its own: pip install '.[bench]'")
    from cache_dit import DBPruneConfig
    from cache_dit.caching.cache_contexts.prune_manager import PrunedContextManager

    blocks, warmup = 8, 3
    config = DBPruneConfig(
        residual_diff_threshold=threshold, max_warmup_steps=warmup, enable_dynamic_prune_threshold=dynamic
    )
    manager = PrunedContextManager("manager")
    manager.set_context(manager.new_context(name="blocks", cache_config=config))
    inputs = [trajectory(100 * seed + block, stride=0.2 + 0.02 * block) for block in range(blocks)]
    expected: list[list[int]] = [[] for _ in range(blocks)]
    for step in range(STEPS):
        manager.mark_step_begin()
        for block in range(blocks):
            tokens, buffer = inputs[block][step], f"{block}_Fn_original"
            if not manager.can_prune(tokens, prefix=buffer):
                manager.set_Fn_buffer(tokens, prefix=buffer)
                expected[block].append(step)
    base, found = PRESETS["dbprune"], Driven()
    policy = base.model_copy(
        update={
            "gate": base.gate.model_copy(update={"threshold": threshold, "dynamic": dynamic}),
            "spans": Spans(granularity=Granularity.PARTS),
            "guards": Guards(warmup_steps=warmup, final_steps=0, max_age_steps=1000),
        }
    )
    drive(
        made(policy, steps=STEPS, blocks=blocks),
        STEPS,
        signals=lambda step, block: compared(inputs[block][step], inputs[block][found.evaluated(block)[-1]]),
        into=found,
    )
    assert [found.evaluated(block) for block in range(blocks)] == expected
    assert warmup < len(expected[0]) < STEPS
