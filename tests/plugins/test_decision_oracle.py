"""The oracle of the decision kernel decides what the host's controller does, for the same words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.caching.block_rules import block_rules
from adacorr_deploy.caching.controllers import PaperController, Run
from adacorr_deploy.caching.decisions import SlotHistory, unit_spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PaperGate, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.plugins.decision_kernels import CASES, NEVER, REASONS, Verdict
from adacorr_deploy.plugins.decision_oracle import decide
from adacorr_deploy.plugins.service_parts import SIGNAL_COUNT
from adacorr_deploy.runtime.observer import signals_of_branches
from tests.caching.driven import answered

STEPS, BLOCKS = 10, 2

policies = st.builds(
    lambda lazy, gamma, lambda_, epsilon, guards: Policy(
        name="mine",
        gate=PaperGate.model_validate(
            {"lazy": lazy, "gamma": gamma, "lambda": 1.0 if lazy else lambda_, "epsilon": epsilon}
        ),
        predictor=Predictor(kind=PredictorKind.HOLD),
        guards=guards,
    ),
    st.booleans(),
    st.floats(1e-3, 100),
    st.floats(0, 100),
    st.floats(0, 0.99),
    st.builds(
        Guards,
        warmup_steps=st.integers(0, 3),
        final_steps=st.integers(0, 3),
        max_age_steps=st.integers(1, 4),
        protected_blocks=st.sampled_from([frozenset(), frozenset({1})]),
    ),
)


@st.composite
def rows_of_images(draw: st.DrawFn) -> tuple[int, NDArray[np.float32]]:
    images = draw(st.integers(1, 3))
    count = images * draw(st.integers(1, 2)) * SIGNAL_COUNT
    number = st.one_of(st.floats(0, 2, width=32), st.sampled_from([math.nan, math.inf]))
    values = draw(st.lists(draw(st.sampled_from([st.floats(0, 2, width=32), number])), min_size=count, max_size=count))
    return images, np.array(values, np.float32).reshape(-1, SIGNAL_COUNT)


@settings(max_examples=300, deadline=None)
@given(
    policy=policies,
    rows=rows_of_images(),
    floors=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    step=st.integers(0, STEPS - 1),
    ago=st.integers(0, 6),
    block=st.integers(0, BLOCKS - 1),
)
def test_it_decides_as_the_controller(
    policy: Policy,
    rows: tuple[int, NDArray[np.float32]],
    floors: tuple[float, float],
    step: int,
    ago: int,
    block: int,
) -> None:
    images, signals = rows
    gate = policy.gate
    assert isinstance(gate, PaperGate)
    filled = step - ago if 0 < ago <= step else NEVER
    used = floors if gate.lazy else None
    controller = PaperController(policy, gate, Run(steps=STEPS, blocks=BLOCKS), unit_spans(BLOCKS), used)
    history = SlotHistory(capacity=1, steps=[] if filled == NEVER else [filled])
    measured = answered(controller, step, block, history, lambda *_: signals_of_branches(signals, images))
    expected = controller.decide(step, block, history, measured)

    rule = block_rules(policy, used, BLOCKS)[block]
    found = decide(rule, signals, images=images, step=step, steps=STEPS, filled=filled)
    assert (CASES[found.action], REASONS[found.reason]) == (expected.action.value, expected.reason)
    assert (None if found.age == NEVER else found.age) == history.age(step)
    assert found.score == (None if expected.score is None else pytest.approx(expected.score, rel=1e-12))
    assert found.weight == (None if expected.weight is None else pytest.approx(expected.weight, rel=1e-9, abs=1e-12))
    if expected.thresholds is not None:
        assert rule.thresholds == expected.thresholds


@pytest.mark.parametrize("score", [None, 0.0, -0.0, 1e300, 1 / 3])
def test_a_record_of_the_trace_holds_a_decision_to_the_last_bit(score: float | None) -> None:
    verdict = Verdict(action=2, reason=7, age=NEVER, score=score, weight=score)
    assert Verdict.of(verdict.record) == verdict
