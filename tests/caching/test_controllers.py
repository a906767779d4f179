"""What each policy decides, on trajectories whose decisions can be worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.calibration import MAX_MEASURE, MIN_COST, MIN_PROBE_ERROR, Calibration
from adacorr_deploy.caching.controllers import AdaCorrectionController, Run, controller_for_policy
from adacorr_deploy.caching.decisions import Action, Controller, Decision, Signals, SlotHistory
from adacorr_deploy.caching.policy import PRESETS, Corrector, Policy, policy_named
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.scores import paper_score, robust_score, weight_from_estimate
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.plugins import oracle
from tests.caching.driven import answered
from tests.caching.scripted_calibration import PROBE_BLOCK, STEPS, calibration

BLOCKS = 2


def signals(offset: float = 0.01, *, temporal: float = 0.0, spatial: float = 0.0) -> Signals:
    return Signals(
        relative_offset=offset,
        relative_offset_p95=offset,
        spatial_change=0.0,
        paper_temporal=temporal,
        paper_spatial=spatial,
    )


def drive(controller: Controller, *, given_signals: Signals | None = None, error: float = 0.1) -> list[list[Decision]]:
    """Run a controller as the loop does, and return its decisions, [step][block]."""
    histories = [SlotHistory(capacity=3) for _ in controller.spans]
    decisions = []
    for step in range(STEPS):
        row = []
        for block, history in enumerate(histories):
            measured = answered(controller, step, block, history, lambda *_: [given_signals or signals()] * 2)
            decision = controller.decide(step, block, history, measured)
            if decision.action is not Action.REUSE:
                if history.steps and controller.measures_error(step, block, history):
                    controller.record_error(step, block, error)
                history.record(step)
            row.append(decision)
        decisions.append(row)
    return decisions


def evaluated_steps(decisions: list[list[Decision]], block: int = 0) -> list[int]:
    return [step for step, row in enumerate(decisions) if row[block].action is Action.EVALUATE]


def controller(policy: Policy | str, *, slope: float = 1.0) -> Controller:
    chosen = policy_named(policy) if isinstance(policy, str) else policy
    made = calibration(predictor=chosen.predictor, slope=slope) if chosen.needs_calibration else None
    return controller_for_policy(chosen, Run(steps=STEPS, blocks=BLOCKS), made)


def test_none_and_fewer_steps_evaluate_every_block() -> None:
    for name in ("none", "fewer-steps"):
        assert evaluated_steps(drive(controller(name))) == list(range(STEPS))


def test_fora_evaluates_every_third_step_and_what_the_guards_ask() -> None:
    decisions = drive(controller("fora"))
    assert evaluated_steps(decisions) == [0, 1, 3, 6, 9, 11]
    assert [decisions[step][0].reason for step in (1, 3, 11)] == ["warm-up", "every 3 steps", "final steps"]


def test_scheduled_follows_the_cheapest_path() -> None:
    # Half of 12 steps; 0, 1 and 11 are forced. Costs grow with the square, so runs of skips are as even as can be.
    steps = evaluated_steps(drive(controller("scheduled@2")))
    assert len(steps) == 6
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps[1:])]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("kind", ["", "-blocks"])
def test_an_average_request_follows_the_schedule(kind: str) -> None:
    scheduled = evaluated_steps(drive(controller(f"scheduled{kind}@2")))
    assert evaluated_steps(drive(controller(f"robust{kind}@2"))) == scheduled


@pytest.mark.parametrize("name", ["robust@2", "robust-blocks@2"])
def test_a_hard_request_is_evaluated_more_often_and_an_easy_one_less(name: str) -> None:
    average, hard, easy = (len(evaluated_steps(drive(controller(name), error=error))) for error in (0.1, 0.5, 0.02))
    assert easy < average < hard


def test_blocks_of_a_step_decide_together() -> None:
    for row in drive(controller("robust-blocks@2"), error=0.3):
        assert len({decision.action for decision in row}) == 1


def test_an_offset_beyond_calibration_is_never_reused() -> None:
    decisions = drive(controller("robust@2"), given_signals=signals(offset=5.0))
    assert evaluated_steps(decisions) == list(range(STEPS))
    assert "offset beyond calibration" in {row[0].reason for row in decisions}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["robust@2", "paper-lazy", "paper-exact"])
def test_signals_that_are_not_finite_force_evaluation(name: str, value: float) -> None:
    decisions = drive(controller(name), given_signals=signals(offset=value, temporal=value))
    assert evaluated_steps(decisions) == list(range(STEPS))


@pytest.mark.parametrize("protected", [0, 1])
def test_a_protected_block_is_evaluated_where_the_others_are_reused(protected: int) -> None:
    base = PRESETS["robust-blocks"]
    guards = base.guards.model_copy(update={"protected_blocks": frozenset({protected})})
    decisions = drive(controller(base.model_copy(update={"guards": guards})))
    assert evaluated_steps(decisions, protected) == list(range(STEPS))
    assert evaluated_steps(decisions, 1 - protected) == evaluated_steps(drive(controller("robust-blocks")))


@pytest.mark.parametrize("kind", list(PredictorKind))
def test_every_predictor_adapts(kind: PredictorKind) -> None:
    base = PRESETS["robust-blocks"]
    policy = base.model_copy(update={"predictor": Predictor(kind=kind)})
    easy, hard = (len(evaluated_steps(drive(controller(policy), error=error))) for error in (0.001, 10.0))
    assert easy < hard


@pytest.mark.parametrize("interval", [3, 8, 10])
def test_fora_follows_its_interval_alone(interval: int) -> None:
    steps = evaluated_steps(drive(controller(f"fora@{interval}")))
    assert steps == sorted({0, 1, STEPS - 1, *range(0, STEPS, interval)})


def test_difficulty_follows_the_measured_error_by_the_calibrated_slope() -> None:
    chosen = controller("robust-blocks@2", slope=0.5)
    assert isinstance(chosen, AdaCorrectionController)
    history = SlotHistory(capacity=3, steps=[4, 2])
    assert chosen.measures_error(5, PROBE_BLOCK, history)
    assert not chosen.measures_error(5, 0, history)
    chosen.record_error(5, PROBE_BLOCK, 0.2)
    assert chosen.difficulty == pytest.approx(
        2 ** (2 * 0.5 * 0.7 * 0.5)
    )  # ratio 2, squared, slope ½, memory 0.3, adaptivity ½


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf])
def test_an_error_that_says_nothing_leaves_the_difficulty(error: float) -> None:
    chosen = controller("robust-blocks@2")
    assert isinstance(chosen, AdaCorrectionController)
    chosen.measures_error(5, PROBE_BLOCK, SlotHistory(capacity=3, steps=[4, 2]))
    chosen.record_error(5, PROBE_BLOCK, error)
    assert chosen.difficulty == 1.0


def test_within_the_band_a_block_is_deferred_until_the_budget_is_spent() -> None:
    reasons = {row[0].reason for error in (0.1, 0.12, 0.15, 0.2) for row in drive(controller("robust@2"), error=error)}
    assert "deferred within the error budget" in reasons
    assert "error budget spent" in reasons


def test_the_paper_corrector_blends_within_the_band() -> None:
    base = PRESETS["robust-blocks"]
    policy = base.model_copy(update={"gate": base.gate.model_copy(update={"corrector": Corrector.PAPER, "band": 0.9})})
    blended = [d for row in drive(controller(policy)) for d in row if d.action is Action.CORRECT]
    assert blended
    assert all(0 < (d.weight or 0) < 1 for d in blended)


def test_paper_exact_launches_every_block_and_blends_by_the_literal_weight() -> None:
    decisions = drive(controller("paper-exact"), given_signals=signals(temporal=0.5, spatial=0.3))
    assert not any(d.action is Action.REUSE for row in decisions for d in row)
    assert decisions[5][0].weight == pytest.approx(0.5**2 + 0.3)


def test_paper_lazy_skips_at_the_floor_and_evaluates_far_above_it() -> None:
    at_floor = drive(controller("paper-lazy"), given_signals=signals(temporal=1.0, spatial=1.0))
    assert at_floor[5][0].action is Action.REUSE  # S = 2 = the first block's floor
    above = drive(controller("paper-lazy"), given_signals=signals(temporal=1.5, spatial=0.0))
    assert above[5][0].action is Action.CORRECT
    assert above[5][0].weight == pytest.approx(0.25)
    assert above[5][1].action is Action.REUSE  # below the second block's floor of 3
    far = drive(controller("paper-lazy"), given_signals=signals(temporal=9.0))
    assert evaluated_steps(far) == list(range(STEPS))


def test_a_paper_score_of_an_unchanged_input_saturates_and_the_robust_score_does_not() -> None:
    """The upstream fault: Δ_spatial never vanishes, so γ = λ = 1 leaves no reuse."""
    unchanged = signals(offset=0.0, temporal=0.0, spatial=1.2)
    assert weight_from_estimate(paper_score(unchanged, 1.0), (0.0, 1.0, 1.0)) == 1.0
    assert robust_score(unchanged) == 0.0


@settings(deadline=None)
@given(estimates=st.lists(st.floats(-10, 10), min_size=2, max_size=2), low=st.floats(0, 1), width=st.floats(0, 2))
def test_weight_is_in_0_to_1_and_rises_with_the_estimate(estimates: list[float], low: float, width: float) -> None:
    small, large = (weight_from_estimate(e, (low, low + width, 1.0)) for e in sorted(estimates))
    assert 0.0 <= small <= large <= 1.0


def test_a_calibrated_policy_without_calibration_or_with_another_predictor_is_refused() -> None:
    policy = PRESETS["robust"]
    with pytest.raises(CalibrationError, match="adacorr-calibrate"):
        controller_for_policy(policy, Run(steps=STEPS, blocks=BLOCKS), None)
    with pytest.raises(CalibrationError, match=r"adacorr-calibrate BUNDLE --sampler .* --order 2"):
        controller_for_policy(
            policy.model_copy(update={"predictor": Predictor(order=2)}), Run(steps=STEPS, blocks=BLOCKS), calibration()
        )


@settings(max_examples=30, deadline=None)
@given(
    errors=st.lists(st.floats(0.001, 10.0), min_size=STEPS, max_size=STEPS),
    offsets=st.lists(st.floats(0, 1), min_size=STEPS, max_size=STEPS),
)
def test_whatever_is_measured_no_slot_outlives_the_maximum_age(errors: list[float], offsets: list[float]) -> None:
    chosen = controller("robust@4")
    history, maximum = SlotHistory(capacity=2), PRESETS["robust"].guards.max_age_steps
    for step in range(STEPS):
        measured = answered(chosen, step, 0, history, lambda at, _: [signals(offsets[at])])
        decision = chosen.decide(step, 0, history, measured)
        if decision.action is Action.REUSE:
            assert 0 < step - history.steps[0] <= maximum
            continue
        if chosen.measures_error(step, PROBE_BLOCK, history):
            chosen.record_error(step, PROBE_BLOCK, errors[step])
        history.record(step)


@settings(deadline=None)
@given(estimate=st.floats(-10, 10, width=32), low=st.floats(0, 1, width=32), width=st.sampled_from([0.0, 0.5, 2.0]))
def test_the_weight_is_that_of_the_blend_part(estimate: float, low: float, width: float) -> None:
    thresholds = (low, low + width, 1.0)
    expected = oracle.blend_weight(np.array([estimate], np.float32), np.array(thresholds, np.float32))
    assert weight_from_estimate(estimate, thresholds) == pytest.approx(float(expected[0]), abs=1e-5)


costs = st.sampled_from([MIN_COST, 1e-6, 1.0, MAX_MEASURE, math.inf])
probe_errors = st.sampled_from([0.0, MIN_PROBE_ERROR, 1.0, MAX_MEASURE])
measures = st.sampled_from([0.0, 5e-324, 1.0, MAX_MEASURE])


def table(values: st.SearchStrategy[float], *, rising: bool = False) -> st.SearchStrategy[list[list[list[float]]]]:
    """Three gaps of three numbers for every step."""
    row = st.lists(values, min_size=3, max_size=3)
    rows = st.lists(row.map(sorted) if rising else row, min_size=3, max_size=3)
    return st.lists(rows, min_size=STEPS, max_size=STEPS)


@settings(max_examples=60)
@given(
    skip_costs=table(costs, rising=True),
    expected=table(probe_errors),
    limits=table(measures),
    slope=st.sampled_from([0.0, 5e-324, 1.0]),
    error=st.sampled_from([0.0, 1e-6, 1.0, 3e38, math.inf]),
    name=st.sampled_from(["robust@1.01", "robust-blocks@20", "scheduled@2", "paper-lazy"]),
)
def test_whatever_a_calibration_holds_every_step_is_decided_and_the_guards_are_kept(
    skip_costs: object,
    expected: object,
    limits: list[list[list[float]]],
    slope: float,
    error: float,
    name: str,
) -> None:
    """A file's values are let through up to their bounds: none may overflow, divide by zero or become NaN."""
    policy = policy_named(name)
    made = calibration(predictor=policy.predictor).model_dump()
    probe = {**made["probe"], "expected": expected, "slope": slope}
    changes = {"skip_costs": skip_costs, "offset_limits": [rows[0] for rows in limits], "probe": probe}
    extreme = Calibration.model_validate({**made, **changes})
    decisions = drive(controller_for_policy(policy, Run(steps=STEPS, blocks=BLOCKS), extreme), error=error)
    assert {0, 1, STEPS - 1} <= set(evaluated_steps(decisions))
    weights = [decision.weight for row in decisions for decision in row if decision.weight is not None]
    assert all(0.0 <= weight <= 1.0 for weight in weights)
