"""The rule that a GPU decides by is the policy's, number for number."""

from __future__ import annotations

import pytest

from adacorr_deploy.caching.block_rules import BlockRule, block_rules
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PRESETS, PaperGate, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import PolicyError


def test_each_block_has_its_floor_and_its_protection() -> None:
    policy = Policy(
        name="mine",
        gate=PaperGate(lazy=True, gamma=2.0, epsilon=0.25),
        predictor=Predictor(kind=PredictorKind.HOLD),
        guards=Guards(warmup_steps=3, final_steps=2, max_age_steps=4, protected_blocks=frozenset({1})),
    )
    first, second = block_rules(policy, (0.5, 0.75), 2)
    assert first == BlockRule(
        lambda_=1.0,
        gamma=2.0,
        epsilon=0.25,
        floor=0.5,
        lazy=True,
        warmup_steps=3,
        final_steps=2,
        max_age_steps=4,
        protected=False,
    )
    assert (second.floor, second.protected) == (0.75, True)
    assert second.thresholds == (0.75, 1.75, 2.0)


def test_a_gate_that_is_not_lazy_subtracts_nothing() -> None:
    assert [(rule.floor, rule.lazy) for rule in block_rules(PRESETS["paper-exact"], None, 3)] == [(0.0, False)] * 3


def test_a_policy_without_such_a_rule_is_refused() -> None:
    with pytest.raises(PolicyError, match="policy robust: gate adacorrection can't decide on the device"):
        block_rules(PRESETS["robust"], None, 3)
