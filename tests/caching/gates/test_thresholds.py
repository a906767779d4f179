"""FBCache, DBCache, DBPrune, FastCache and LazyDiT on trajectories that can be worked out by hand."""

from __future__ import annotations

import math

import pytest

from adacorr_deploy.caching.decisions import Kept, Observed
from adacorr_deploy.caching.gates.thresholds import (
    FastCacheGate,
    FirstBlocksGate,
    PruneGate,
    chi_square_quantile_per_degree,
    sigmoid,
)
from adacorr_deploy.caching.granularity import Granularity, Spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PRESETS, policy_named
from tests.caching.driven import change, drive, each_step, made, steadily
from tests.caching.scripted_profile import profile


def test_fbcache_evaluates_the_rest_where_the_first_residual_moved() -> None:
    controller = made(policy_named("fbcache@0.1"), steps=6, blocks=4)
    assert [(span.first, span.stop) for span in controller.spans] == [(0, 1), (1, 4)]
    driven = drive(controller, 6, signals=each_step([0, 0.05, 0.11, 0.1, 0.2, 0.0]))
    assert driven.evaluated(1) == [0, 2, 4]  # at the limit it is reused
    assert driven.evaluated(0) == list(range(6))
    (observation,) = controller.observations(1)
    assert not controller.observations(0)
    assert (observation.what, observation.kept) == (Observed.RESIDUAL, Kept.EVALUATION)


def test_dbcache_evaluates_its_warm_up_and_after_as_many_reused_steps_as_the_guard_allows() -> None:
    base = PRESETS["dbcache"]
    policy = base.model_copy(update={"guards": Guards(warmup_steps=8, final_steps=0, max_age_steps=2)})
    driven = drive(made(policy, steps=16, blocks=10), 16, signals=steadily(0.01))
    assert driven.evaluated(1) == [*range(8), 10, 13]


def test_dbcache_spends_no_more_reused_steps_than_its_limit() -> None:
    base = PRESETS["dbcache"]
    policy = base.model_copy(update={"gate": FirstBlocksGate(max_reused_steps=3)})
    driven = drive(made(policy, steps=14, blocks=10), 14, signals=steadily(0.01))
    assert driven.evaluated(1) == [*range(8), 11, 12, 13]


def prune(*, dynamic: bool) -> PruneGate:
    return PruneGate(threshold=0.1, dynamic=dynamic)


def test_dbprune_decides_each_block_by_its_own_input() -> None:
    base = PRESETS["dbprune"]
    spans = Spans(granularity=Granularity.PARTS, first=1)
    policy = base.model_copy(update={"gate": prune(dynamic=False), "spans": spans, "guards": Guards(warmup_steps=1)})
    driven = drive(made(policy, steps=5, blocks=3), 5, signals=lambda step, span: [change((0, 0.05, 0.15)[span])] * 2)
    assert driven.evaluated(0) == driven.evaluated(2) == list(range(5))
    assert driven.evaluated(1) == [0, 4]


def test_dbprunes_limit_follows_the_changes_that_the_step_has_measured() -> None:
    gate = prune(dynamic=True)
    assert gate.limit([0.5]) == 0.1  # nothing measured before this block
    assert gate.limit([0.12, 0.5]) == pytest.approx(0.15)  # 1.25 · 0.12
    assert gate.limit([0.05, 0.5]) == 0.1  # never below the threshold
    assert gate.limit([0.2, 0.5]) == 0.1  # twice the threshold or more: not taken
    assert gate.limit([0.1] * 5 + [9.0, 0.5]) == pytest.approx(0.125)  # the first five alone
    assert prune(dynamic=False).limit([0.12, 0.5]) == 0.1


# Quantiles of χ² tables: (probability, degrees) → quantile.
QUANTILES = {(0.95, 30): 43.773, (0.95, 100): 124.342, (0.99, 100): 135.807, (0.05, 100): 77.929, (0.5, 30): 29.336}


@pytest.mark.parametrize(("probability", "degrees"), list(QUANTILES))
def test_the_chi_square_quantile_is_that_of_the_tables(probability: float, degrees: int) -> None:
    expected = QUANTILES[probability, degrees] / degrees
    assert chi_square_quantile_per_degree(probability, degrees) == pytest.approx(expected, rel=1e-3)


def test_fastcache_as_published_passes_below_a_change_of_a_hundred_percent() -> None:
    for alpha in (0.5, 0.05, 1e-6):
        assert FastCacheGate(alpha=alpha).limit(49 * 128) == pytest.approx(1.0, abs=0.05)


def test_fastcache_compares_each_block_with_the_step_before() -> None:
    policy = policy_named("fastcache@0.05")
    limit = FastCacheGate(scale=0.05).limit(64)
    changes = [0.0, 0.9 * limit, 1.1 * limit, 0.9 * limit]
    controller = made(policy, steps=4, profile=profile(steps=4))
    driven = drive(controller, 4, signals=each_step(changes))
    assert driven.evaluated(0) == driven.evaluated(1) == [0, 2]
    (observation,) = controller.observations(0)
    assert (observation.what, observation.kept) == (Observed.INPUT, Kept.STEP)


def test_lazydit_reuses_where_both_branches_gates_say_so() -> None:
    logits = [[0.0, 0.0], [0.5, 2.0], [-0.1, 2.0], [0.0, 0.0]]
    controller = made(PRESETS["lazydit"], steps=4, profile=profile(steps=4))
    driven = drive(controller, 4, signals=lambda step, span: [change(0.0, probe=logit) for logit in logits[step]])
    assert driven.evaluated() == [0, 2]
    assert driven.scores()[1] == pytest.approx(1 / (1 + math.exp(-0.5)))
    (observation,) = controller.observations(1)
    assert (observation.what, observation.weights, observation.bias) == (Observed.PROBE, (1.0,) * 3, 0.5)


def test_a_probe_that_was_not_measured_forces_an_evaluation() -> None:
    driven = drive(made(PRESETS["lazydit"], steps=3, profile=profile(steps=3)), 3, signals=steadily(0.0))
    assert driven.evaluated() == [0, 1, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["fbcache", "dbcache", "dbprune", "fastcache"])
def test_a_change_that_is_not_finite_forces_an_evaluation(name: str, value: float) -> None:
    driven = drive(
        made(PRESETS[name], steps=12, blocks=10, profile=profile(steps=12, parts=10)), 12, signals=steadily(value)
    )
    assert all(driven.evaluated(span) == list(range(12)) for span in range(len(driven.decisions[0])))


def test_the_sigmoid_does_not_overflow() -> None:
    assert sigmoid(-1e6) == 0.0
    assert sigmoid(1e6) == 1.0
    assert sigmoid(0.3) + sigmoid(-0.3) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["lazydit", "fastcache"])
def test_a_guarded_gate_is_asked_after_an_evaluation_only_and_the_published_one_at_every_step(name: str) -> None:
    def evaluated(policy: str) -> list[int]:
        controller = made(policy_named(policy), steps=7, profile=profile(steps=7))
        return drive(controller, 7, signals=lambda step, span: [change(0.001, probe=5.0)]).evaluated()

    assert evaluated(name) == [0]
    assert evaluated(f"{name}-guarded") == [0, 2, 4, 6]
