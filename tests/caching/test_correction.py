"""AdaCorrection on top of a gate: the gate proposes, the calibrated weight decides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.controllers import GateController, Run
from adacorr_deploy.caching.decisions import Action, Span, SpanCache
from adacorr_deploy.caching.gates.adacorrection import AdaCorrectionGate, Correction, PaperGate
from adacorr_deploy.caching.gates.steps import MaskGate
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.planner import planner_for
from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.caching.request_plan import probed_span
from adacorr_deploy.core.errors import CalibrationError, PolicyError
from tests.caching.driven import Driven, change, drive, made, steadily
from tests.caching.scripted_calibration import STEPS, calibration
from tests.caching.scripted_profile import profile

BASES = [
    name
    for name, policy in PRESETS.items()
    if policy.caches and not isinstance(policy.gate, AdaCorrectionGate | PaperGate)
]
PARTS = 10


def calibrated(policy: Policy, *, blocks: int = 2) -> Calibration:
    """Costs of k² · 1e-4, for the spans of so many parts."""
    spans = policy.spans_of(Run(steps=STEPS, blocks=blocks))
    return calibration(predictor=policy.predictor, spans=spans, blocks=blocks)


def run(policy: Policy | str, *, error: float = 0.1, relative: float = 0.01, blocks: int = 2) -> Driven:
    chosen = policy_named(policy) if isinstance(policy, str) else policy
    controller = made(
        chosen,
        steps=STEPS,
        blocks=blocks,
        calibration=calibrated(chosen, blocks=blocks) if chosen.needs_calibration else None,
        profile=profile(steps=STEPS, parts=blocks),
    )
    return drive(
        controller,
        STEPS,
        signals=lambda step, span: [change(relative, probe=1.0 - 20 * relative)] * 2,
        changes=steadily(relative),
        error=error,
    )


def masked(evaluated: set[int], **correction: float | str | bool) -> Policy:
    """A base that evaluates given steps, with AdaCorrection on top."""
    base = Policy(
        name="base",
        gate=MaskGate(rows=tuple("1" if step in evaluated else "0" for step in range(STEPS))),
        guards=Guards(warmup_steps=2, final_steps=1, max_age_steps=6),
    )
    return Policy.model_validate({**base.model_dump(mode="json", by_alias=True), "correction": correction})


def planned(policy: Policy, speedup: float = 2.0) -> set[int]:
    planner = planner_for(calibrated(policy), policy.guards)
    return set(planner.plan(planner.price(speedup)).evaluated_steps())


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
def test_a_base_that_proposes_the_plan_is_unchanged(speedup: float) -> None:
    """Of an average request, whose errors are those of the calibration."""
    plan = planned(masked(set(range(STEPS))), speedup)
    assert len(plan) < STEPS
    driven = run(masked(plan, speedup=speedup))
    assert set(driven.evaluated(0)) == set(driven.evaluated(1)) == plan
    assert driven.decisions[2][0].weight is not None


def test_below_the_band_a_step_is_promoted_whatever_the_base_says() -> None:
    """The base evaluates every step; a band of 0 leaves nothing in between."""
    everything = set(range(STEPS))
    driven = run(masked(everything, band=0.0))
    assert set(driven.evaluated()) == planned(masked(everything))
    assert "promoted: estimate below the allowance" in driven.reasons()


def test_promotion_can_be_switched_off() -> None:
    driven = run(masked(set(range(STEPS)), band=0.0, promote=False))
    assert driven.evaluated() == list(range(STEPS))


def test_above_the_band_a_step_is_evaluated_whatever_the_base_says() -> None:
    """The base reuses all it may: the plan's evaluations are added."""
    driven = run(masked({0}, band=0.0))
    assert set(driven.evaluated()) == planned(masked({0}))
    assert "estimate above the allowance" in driven.reasons()


def test_within_the_band_the_bases_proposal_stands_until_the_budget_is_spent() -> None:
    reuses, evaluates = (run(masked(steps, band=0.99)) for steps in ({0}, set(range(STEPS))))
    assert evaluates.evaluated() == list(range(STEPS))  # nothing is far enough below to be promoted
    assert "mask" in reuses.reasons()
    assert "error budget spent" in reuses.reasons()
    assert len(reuses.evaluated()) < STEPS


def spent(driven: Driven) -> float:
    rows = [decision for row in driven.decisions for decision in row if decision.action is Action.REUSE]
    return sum(decision.score or 0.0 for decision in rows) / len(driven.decisions[0])


@settings(max_examples=60, deadline=None)
@given(
    evaluated=st.sets(st.integers(0, STEPS - 1)),
    speedup=st.sampled_from([1.2, 2.0, 4.0]),
    band=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    errors=st.sampled_from([0.01, 0.1, 1.0]),
)
def test_reuses_in_the_band_never_spend_more_than_the_plan_has_by_then(
    evaluated: set[int], speedup: float, band: float, errors: float
) -> None:
    policy = masked(evaluated | {0}, speedup=speedup, band=band)
    planner = planner_for(calibrated(policy), policy.guards)
    budget = planner.expected_spending(planner.price(speedup))
    driven = run(policy, error=errors)
    for step in range(STEPS):
        upto = Driven(decisions=driven.decisions[: step + 1])
        if any(row.weight and row.action is Action.REUSE for row in driven.decisions[step]):
            assert spent(upto) <= budget[step] * (1 + 1e-6)


def test_a_spent_budget_is_blended_by_the_paper_corrector() -> None:
    driven = run(masked({0}, band=0.99, corrector="paper"))
    blended = [row[0] for row in driven.decisions if row[0].action is Action.CORRECT]
    assert blended
    assert all(decision.thresholds is not None and 0 < (decision.weight or 0) < 1 for decision in blended)


def test_the_cheap_corrector_is_refused_where_blocks_have_no_halves() -> None:
    with pytest.raises(PolicyError, match="whole blocks"):
        run(masked({0}, corrector="cheap"))


def test_the_cheap_corrector_reuses_the_attention_half_and_evaluates_the_mlp() -> None:
    policy = masked({0}, band=0.99, corrector="cheap")
    driven = drive(made(policy, steps=STEPS, halves=True, calibration=calibrated(policy)), STEPS)
    cheap = [row for row in driven.decisions if row[0].reason == "attention half reused"]
    assert cheap
    assert all(row[0].action is Action.REUSE for row in cheap)
    assert all(row[1].action is Action.EVALUATE for row in cheap)


@pytest.mark.parametrize("base", BASES)
def test_on_every_base_an_easy_request_is_evaluated_less_than_a_hard_one(base: str) -> None:
    policy = policy_named(
        f"{base}+adacorrection@1.5"
    )  # a guard at one step of age allows no more than half to be reused
    guards = policy.guards.model_copy(update={"warmup_steps": 2})  # some warm up for most of so short a run
    policy = policy.model_copy(update={"guards": guards})
    easy, hard = (run(policy, error=error, blocks=PARTS) for error in (0.001, 10.0))
    span = 1 if base == "deepcache" else -1  # one that keeps something
    assert len(easy.evaluated(span)) < len(hard.evaluated(span))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("error", [0.0, 0.1, math.inf])
def test_on_every_base_its_guards_hold(base: str, error: float) -> None:
    guards = PRESETS[base].guards
    forced = {0, *range(guards.warmup_steps), *range(STEPS - guards.final_steps, STEPS)}
    driven = run(f"{base}+adacorrection@3", error=error, blocks=PARTS)
    assert all(forced <= set(driven.evaluated(span)) for span in range(len(driven.decisions[0])))


def test_the_gate_is_told_what_was_done_and_not_what_it_proposed() -> None:
    """TeaCache would evaluate at step 2; promoted, its sum goes on."""
    policy = policy_named("teacache@0.15+adacorrection@3")
    driven = run(policy, relative=0.1)
    assert "promoted: estimate below the allowance" in driven.reasons()
    controller = made(policy, steps=STEPS, calibration=calibrated(policy), profile=profile(steps=STEPS))
    assert isinstance(controller, GateController)


def test_the_span_with_the_probed_part_tells_the_difficulty() -> None:
    edges = Span(first=0, stop=2, cache=SpanCache.NONE), Span(first=8, stop=9, cache=SpanCache.NONE)
    spans = (edges[0], Span(first=2, stop=8, cache=SpanCache.RESIDUAL), edges[1])
    assert [probed_span(spans, block) for block in (0, 5, 8)] == [1, 1, 1]


def test_a_name_takes_the_knob_of_the_base_and_the_target_of_the_correction() -> None:
    policy = policy_named("teacache@0.3+adacorrection@2.5")
    assert policy.name == "teacache@0.3+adacorrection@2.5"
    assert policy.gate.model_dump()["threshold"] == 0.3
    assert policy.correction == Correction(speedup=2.5)
    assert policy_named("fora+adacorrection").correction is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none+adacorrection", "none keeps nothing"),
        ("robust+adacorrection", "adacorrection is AdaCorrection itself"),
        ("paper-lazy+adacorrection", "paper is AdaCorrection itself"),
        ("teacache+adacorrection@0", "correction.robust.speedup"),
        ("teacache+adacorrection@", "correction.robust.speedup"),
        ("teacache+adacorrections", "neither a preset"),
        ("tea+adacorrection", "neither a preset"),
        ("+adacorrection", "neither a preset"),
    ],
)
def test_what_can_not_be_corrected_is_refused(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_named(name)


def test_a_calibration_for_other_spans_is_refused() -> None:
    policy = policy_named("fbcache+adacorrection")
    whole = calibration(predictor=policy.predictor, blocks=4)
    with pytest.raises(CalibrationError, match=r"other spans .* --policies fbcache\+adacorrection"):
        made(policy, steps=STEPS, blocks=4, calibration=whole)


def test_without_a_calibration_it_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"policy fora\+adacorrection@2 needs a calibration"):
        made(policy_named("fora+adacorrection@2"), steps=STEPS)
