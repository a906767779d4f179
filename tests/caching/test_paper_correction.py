"""The paper's weight on top of a gate: its reuses are corrected, its evaluations stand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from adacorr_deploy.caching.controllers import Run
from adacorr_deploy.caching.decisions import Action, Controller, Decision, Kept, Observed, Signals, SlotHistory
from adacorr_deploy.caching.gates.adacorrection import Correction, Mode, PaperCorrection
from adacorr_deploy.caching.gates.steps import MaskGate
from adacorr_deploy.caching.guards import NOT_FINITE, Guards
from adacorr_deploy.caching.policy import Policy, policy_named
from adacorr_deploy.core.errors import CalibrationError, PolicyError
from tests.caching.driven import change, drive, made
from tests.caching.scripted_calibration import STEPS, calibration
from tests.caching.scripted_profile import profile

FLOOR = 2.0  # of the scripted calibration, of even parts; of odd ones it is 3
EVERYTHING = frozenset(range(STEPS))


def moved(temporal: float, spatial: float, *, relative: float = 0.01) -> Signals:
    return replace(change(relative, probe=1.0), paper_temporal=temporal, paper_spatial=spatial)


def masked(evaluated: frozenset[int], mode: Mode, **equations: float) -> Policy:
    """A base that evaluates given steps, with the paper on top."""
    base = Policy(
        name="base",
        gate=MaskGate(rows=tuple("1" if step in evaluated else "0" for step in range(STEPS))),
        guards=Guards(warmup_steps=2, final_steps=1, max_age_steps=6),
    )
    return Policy.model_validate({**base.model_dump(by_alias=True), "correction": {"mode": mode.value, **equations}})


def controller_of(policy: Policy | str, *, blocks: int = 2) -> Controller:
    chosen = policy_named(policy) if isinstance(policy, str) else policy
    spans = chosen.spans_of(Run(steps=STEPS, blocks=blocks))
    return made(
        chosen,
        steps=STEPS,
        blocks=blocks,
        calibration=calibration(predictor=chosen.predictor, spans=spans, blocks=blocks),
        profile=profile(steps=STEPS, parts=blocks),
    )


def decided(policy: Policy, *branches: Signals, span: int = 0) -> Decision:
    """Decide on one step behind the warm-up, whose signals are given."""
    history = SlotHistory(capacity=3, steps=[2, 1])
    return controller_of(policy).decide(3, span, history, [branches])


@pytest.mark.parametrize(
    ("temporal", "spatial", "action", "weight"),
    [
        (0.0, 1.9, Action.REUSE, 0.0),  # S = 1.9, below the floor
        (1.0, 1.04, Action.REUSE, 0.04),  # S = 2.04, within ε
        (1.0, 1.5, Action.CORRECT, 0.5),
        (0.5, 2.0, Action.CORRECT, 0.25),  # S = 0.25 + 2
        (2.0, 0.0, Action.EVALUATE, 1.0),  # S = 4, and the weight is clipped
    ],
)
def test_lazily_a_reuse_is_corrected_by_what_the_score_exceeds_its_floor(
    temporal: float, spatial: float, action: Action, weight: float
) -> None:
    found = decided(masked(frozenset({0}), Mode.PAPER_LAZY), moved(temporal, spatial))
    assert found.action is action
    assert found.weight == pytest.approx(weight)
    assert found.score == pytest.approx(temporal**2 + spatial)
    assert found.thresholds == (FLOOR, FLOOR + 1, 1.0)
    assert found.reason == ("mask" if action is Action.REUSE else "weight above epsilon")


def test_a_floor_is_that_of_the_spans_first_part() -> None:
    policy = masked(frozenset({0}), Mode.PAPER_LAZY)
    even, odd = (decided(policy, moved(0.0, 3.5), span=span) for span in (0, 1))
    assert (even.weight, odd.weight) == (1.0, 0.5)
    behind = controller_of("fbcache+paper-lazy", blocks=4)  # the second span is parts 1 … 3
    found = behind.decide(3, 1, SlotHistory(capacity=1, steps=[2]), [[change(0.0)], [moved(0.0, 3.5)]])
    assert found.weight == pytest.approx(0.5)


def test_gamma_and_epsilon_are_the_papers() -> None:
    policy = masked(frozenset({0}), Mode.PAPER_LAZY, gamma=0.5, epsilon=0.3)
    assert decided(policy, moved(0.0, 2.5)).action is Action.REUSE  # w = ½ · ½
    assert decided(policy, moved(0.0, 2.7)).weight == pytest.approx(0.35)


@pytest.mark.parametrize(("spatial", "weight"), [(0.0, 0.0), (0.3, 0.3), (5.0, 1.0)])
def test_exactly_every_reuse_is_evaluated_and_blended(spatial: float, weight: float) -> None:
    found = decided(masked(frozenset({0}), Mode.PAPER_EXACT), moved(0.0, spatial))
    assert (found.action, found.weight, found.thresholds) == (Action.CORRECT, weight, (0.0, 1.0, 1.0))
    assert decided(masked(frozenset({0}), Mode.PAPER_EXACT, **{"lambda": 0.5}), moved(0.0, 0.8)).weight == 0.4


def test_the_worse_branch_decides_for_both() -> None:
    assert decided(masked(frozenset({0}), Mode.PAPER_LAZY), moved(0.0, 0.0), moved(0.0, 2.5)).weight == 0.5


@pytest.mark.parametrize("mode", [Mode.PAPER_LAZY, Mode.PAPER_EXACT])
def test_what_the_gate_evaluates_is_evaluated_and_not_measured(mode: Mode) -> None:
    """The paper promotes nothing; and of a gate whose proposals are known, nothing is asked for at these steps."""
    driven = drive(controller_of(masked(EVERYTHING - {5}, mode)), STEPS)
    assert all(row[0].action is Action.EVALUATE for step, row in enumerate(driven.decisions) if step != 5)
    assert driven.asked == [(5, 0), (5, 1)]


@pytest.mark.parametrize("mode", [Mode.PAPER_LAZY, Mode.PAPER_EXACT])
def test_without_finite_signals_a_span_is_evaluated(mode: Mode) -> None:
    policy = masked(frozenset({0}), mode)
    found = decided(policy, moved(math.nan, 0.0))
    missing = controller_of(policy).decide(3, 0, SlotHistory(capacity=1, steps=[2]), [None])
    assert [(each.action, each.reason) for each in (found, missing)] == [(Action.EVALUATE, NOT_FINITE)] * 2


def test_each_observation_reaches_whoever_asked_for_it() -> None:
    """TeaCache's sum goes by the first, the paper's score by the second."""
    still, fast = moved(0.0, 0.0, relative=0.0), moved(3.0, 0.0, relative=5.0)
    outcomes = []
    for rule, paper in ((still, still), (fast, still), (still, fast)):
        history = SlotHistory(capacity=1, steps=[2])
        found = controller_of("teacache+paper-lazy").decide(3, 0, history, [[rule], [paper]])
        outcomes.append((found.action, found.weight))
    assert outcomes == [(Action.REUSE, 0.0), (Action.EVALUATE, None), (Action.EVALUATE, 1.0)]


def test_a_correction_adds_its_observation_unless_the_gate_has_the_same() -> None:
    watched = {
        name: [(each.what, each.kept) for each in controller_of(f"{name}+paper-exact", blocks=10).observations(span)]
        for name, span in {"fora": 0, "teacache": 0, "fbcache": 1, "lazydit": 0, "easycache": 0}.items()
    }
    paper = (Observed.INPUT, Kept.EVALUATION)
    assert watched == {
        "fora": [paper],
        "teacache": [(Observed.MODULATED, Kept.STEP), paper],
        "fbcache": [(Observed.RESIDUAL, Kept.EVALUATION), paper],
        "lazydit": [(Observed.PROBE, Kept.EVALUATION), paper],
        "easycache": [(Observed.INPUT, Kept.STEP), paper],
    }
    pruning = controller_of("dbprune+paper-exact", blocks=10)
    assert len(pruning.observations(9)) == 1, "each block's input, as the paper has it"
    assert not pruning.observations(0), "the first blocks keep nothing"


def test_only_the_lazy_mode_needs_a_calibration_and_takes_any() -> None:
    exact, lazy = policy_named("fora+paper-exact"), policy_named("fora+paper-lazy")
    assert (exact.needs_calibration, lazy.needs_calibration, lazy.needs_costs) == (False, True, False)
    made(exact, steps=STEPS)
    made(lazy, steps=STEPS, calibration=calibration())  # of another predictor
    with pytest.raises(CalibrationError, match=r"policy fora\+paper-lazy needs a calibration"):
        made(lazy, steps=STEPS)
    assert policy_named("scheduled-blocks+paper-exact").needs_costs, "the schedule does"


def test_a_files_table_names_the_mode_and_without_one_it_is_robust(tmp_path: Path) -> None:
    def of_file(correction: object) -> Policy:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({"name": "mine", "gate": {"kind": "interval"}, "correction": correction}))
        return policy_named(str(path))

    assert of_file({}).correction == of_file({"mode": "robust"}).correction == Correction()
    lazy = of_file({"mode": "paper-lazy", "epsilon": 0.2})
    assert lazy.correction == PaperCorrection(mode=Mode.PAPER_LAZY, epsilon=0.2)
    assert of_file(lazy.model_dump(mode="json", by_alias=True)["correction"]) == lazy
    for wrong, message in (
        ({"mode": "paper"}, "mode must be one of robust, paper-lazy, paper-exact"),
        ({"mode": ["robust"]}, "mode must be one of"),
        (3, "mode must be one of"),
        ({"mode": "paper-lazy", "lambda": 0.5}, "floor"),
        ({"mode": "paper-exact", "speedup": 2}, "correction.paper.speedup: Extra"),
        ({"epsilon": 0.1}, "correction.robust.epsilon: Extra"),
    ):
        with pytest.raises(PolicyError, match=message):
            of_file(wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scheduled+paper-lazy", "stands for whole steps and can't blend blocks"),
        ("none+paper-exact", "none keeps nothing"),
        ("robust-blocks+paper-lazy", "adacorrection is AdaCorrection itself"),
        ("paper-lazy+paper-exact", "paper is AdaCorrection itself"),
        ("fora+paper-lazy@2", "fora.paper-lazy has no target: leave out '@2'"),
        ("fora+paper-lazy+adacorrection", "neither a preset"),
        ("fora+paper", "neither a preset"),
    ],
)
def test_what_can_not_be_corrected_is_refused(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_named(name)
