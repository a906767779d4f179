"""Controllers: a policy's decisions for one request. State and policy are separate; both are numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Controller,
    Decision,
    Observation,
    Observed,
    Prediction,
    Signals,
    SlotHistory,
    Span,
    unit_spans,
    whole_step_spans,
)
from adacorr_deploy.caching.guards import BEYOND_CALIBRATION, NOT_FINITE, doubtful
from adacorr_deploy.caching.planner import planner_for
from adacorr_deploy.caching.policy import (
    AdaCorrectionGate,
    Corrector,
    FewerStepsGate,
    IntervalGate,
    NoGate,
    PaperGate,
    Policy,
    ScheduleGate,
)
from adacorr_deploy.core.errors import CalibrationError

_INPUT: Final = Observation(what=Observed.INPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a controller must know of a request and its bundle."""

    steps: int
    blocks: int  # block parts
    lags: bool = False  # decide with the measurements of earlier steps


def spans_for(policy: Policy, run: Run) -> tuple[Span, ...]:
    """Return how a policy divides the block parts."""
    return whole_step_spans(run.blocks) if policy.predictor.whole_step else unit_spans(run.blocks)


class StaticController:
    """Evaluates the blocks of given steps and reuses the others."""

    def __init__(self, policy: Policy, run: Run, evaluated: frozenset[int], reason: str) -> None:
        self._policy = policy
        self._run = run
        self._spans = spans_for(policy, run)
        self._evaluated = evaluated
        self._reason = reason

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def lags(self) -> bool:
        return self._run.lags

    def observation(self, span: int) -> Observation | None:
        return None

    def affine(self, span: int) -> Affine | None:
        return None

    def needs_signals(self, step: int, block: int, history: SlotHistory) -> bool:
        return False

    def decide(self, step: int, block: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        if step in self._evaluated:
            return Decision(action=Action.EVALUATE, reason=self._reason)
        guard = guard_reason(self._policy, self._run, step, block, history)
        return (
            Decision(action=Action.EVALUATE, reason=guard)
            if guard
            else Decision(action=Action.REUSE, reason=self._reason)
        )

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        return self._policy.predictor.prediction(step, history.steps)

    def measures_error(self, step: int, block: int, history: SlotHistory) -> bool:
        return False

    def record_error(self, step: int, block: int, error: float) -> None:
        raise AssertionError("a static policy measures no error")

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        raise AssertionError("a static policy observes no change")


class PaperController:
    """The paper's score, weight and blend; with `lazy`, a block whose weight is at most ε is not launched."""

    def __init__(self, policy: Policy, gate: PaperGate, run: Run, floors: Sequence[float] | None) -> None:
        self._policy = policy
        self._gate = gate
        self._run = run
        self._spans = spans_for(policy, run)
        self._floors = floors

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def lags(self) -> bool:
        return self._run.lags

    def observation(self, span: int) -> Observation | None:
        return _INPUT

    def affine(self, span: int) -> Affine | None:
        return None

    def needs_signals(self, step: int, block: int, history: SlotHistory) -> bool:
        return guard_reason(self._policy, self._run, step, block, history) is None

    def decide(self, step: int, block: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        guard = guard_reason(self._policy, self._run, step, block, history)
        if guard or signals is None or doubtful(signals):
            return Decision(action=Action.EVALUATE, reason=guard or NOT_FINITE)
        score = max(paper_score(branch, self._gate.lambda_) for branch in signals)
        floor = self._floors[block] if self._floors is not None else 0.0
        thresholds = (floor, floor + 1.0, self._gate.gamma)
        weight = weight_from_estimate(score, thresholds)
        action, reason = Action.CORRECT, "weight above epsilon" if self._gate.lazy else "paper: always evaluated"
        if self._gate.lazy and weight <= self._gate.epsilon:
            action, reason = Action.REUSE, "weight within epsilon"
        elif self._gate.lazy and weight == 1.0:
            action = Action.EVALUATE
        return Decision(action=action, reason=reason, score=score, weight=weight, thresholds=thresholds)

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        return replace(self._policy.predictor.prediction(step, history.steps), onto_kept_input=True)

    def measures_error(self, step: int, block: int, history: SlotHistory) -> bool:
        return False

    def record_error(self, step: int, block: int, error: float) -> None:
        raise AssertionError("the paper's policies measure no error")

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        raise AssertionError("the paper's policies observe no change")


class AdaCorrectionController:
    """The calibrated schedule, corrected by what this request measures.

    A step's blocks decide together, at its first block: METHOD §3's study found that blocks evaluated on partly
    predicted inputs spoil the histories that extrapolation needs. The estimate ê of a step is the error that skipping
    it adds by calibration, times the difficulty of the request: how much larger than in calibration the probe errors
    were at its own evaluations. Harder by r² is the same as an evaluation cheaper by r², so the allowance
    comes from the plan at that price. `adaptivity` says how far difficulty counts: at 0 every request follows the
    schedule of the average one.
    """

    def __init__(self, policy: Policy, gate: AdaCorrectionGate, run: Run, calibration: Calibration) -> None:
        self._policy = policy
        self._gate = gate
        self._run = run
        self._spans = spans_for(policy, run)
        self._calibration = calibration
        self._planner = planner_for(calibration, policy.guards)
        self._price = self._planner.price(gate.speedup)
        self._budget = self._planner.expected_spending(self._price)
        self._log_error = 0.0  # measured over expected, squared; a running mean of its logarithm
        self._spent = 0.0
        self._decided: tuple[int, Decision] | None = None
        self._steps = SlotHistory(
            capacity=2
        )  # the steps that were not skipped; protected blocks have more of their own
        self._measured_at: dict[int, tuple[int, int]] = {}  # step → distance and gap of the error that is on its way

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    @property
    def lags(self) -> bool:
        return self._run.lags

    def observation(self, span: int) -> Observation | None:
        return _INPUT if span == 0 else None

    def affine(self, span: int) -> Affine | None:
        return None

    def needs_signals(self, step: int, block: int, history: SlotHistory) -> bool:
        return block == 0 and self._step_guard(step) is None

    def _step_guard(self, step: int) -> str | None:
        return self._policy.guards.step_reason(step=step, steps=self._run.steps, age=self._steps.age(step))

    def decide(self, step: int, block: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        if self._decided is None or self._decided[0] != step:
            self._decided = (step, self._decide_step(step, history, signals))
            if self._decided[1].action is not Action.REUSE:
                self._steps.record(step)
        decision = self._decided[1]
        guard = guard_reason(self._policy, self._run, step, block, history)
        if guard and decision.action is not Action.EVALUATE:
            return Decision(action=Action.EVALUATE, reason=guard, score=decision.score, weight=decision.weight)
        return decision

    def _decide_step(self, step: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        guard = self._step_guard(step)
        if guard or (signals is None and not self.lags) or (signals is not None and doubtful(signals)):
            return Decision(action=Action.EVALUATE, reason=guard or NOT_FINITE)
        age, gap = step - self._steps.steps[0], _gap(self._steps)
        if signals is not None:
            offset = max(robust_score(branch) for branch in signals)
            if offset > self._offset_limit(step - self.lags, (history.age(step) or 1) - self.lags):
                return Decision(action=Action.EVALUATE, reason=BEYOND_CALIBRATION, score=offset, weight=1.0)
        plan = self._planner.plan(self._price / self.difficulty)
        estimate = self._planner.costs.added(step, gap, age - 1) * self.difficulty
        allowance = plan.allowance(step, gap, age - 1) * self.difficulty
        return self._weighed(step, estimate, allowance)

    def _offset_limit(self, step: int, age: int) -> float:
        """Return the largest score that is within calibration for inputs of `step`, `age` steps after an evaluation."""
        limits = self._calibration.offset_limits[step]
        return self._gate.offset_margin * limits[min(max(age, 1), len(limits)) - 1]

    def _weighed(self, step: int, estimate: float, allowance: float) -> Decision:
        if allowance <= 0 or not math.isfinite(estimate):
            return Decision(action=Action.EVALUATE, reason="evaluating pays in any case", score=estimate, weight=1.0)
        thresholds = ((1 - self._gate.band) * allowance, (1 + self._gate.band) * allowance, self._gate.gamma)
        weight = weight_from_estimate(estimate, thresholds)
        if weight >= 1.0:
            return Decision(
                action=Action.EVALUATE, reason="estimate above the allowance", score=estimate, weight=weight
            )
        if weight > 0.0:
            if self._gate.corrector is Corrector.PAPER:
                return Decision(
                    action=Action.CORRECT, reason="blended", score=estimate, weight=weight, thresholds=thresholds
                )
            if self._spent + estimate > self._budget[step]:
                return Decision(action=Action.EVALUATE, reason="error budget spent", score=estimate, weight=weight)
        self._spent += estimate
        reason = "estimate below the allowance" if weight == 0.0 else "deferred within the error budget"
        return Decision(action=Action.REUSE, reason=reason, score=estimate, weight=weight)

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        return self._policy.predictor.prediction(step, history.steps)

    def measures_error(self, step: int, block: int, history: SlotHistory) -> bool:
        enough = len(history.steps) >= min(2, self._policy.predictor.history)
        if block != self._calibration.probe.block or not enough:
            return False
        self._measured_at[step] = (step - history.steps[0], _gap(history))
        return True

    def record_error(self, step: int, block: int, error: float) -> None:
        probe = self._calibration.probe
        distance, gap = self._measured_at.pop(step)
        cube = probe.expected[step]
        expected = cube[min(gap, len(cube)) - 1][min(distance, len(cube[0])) - 1]
        if expected > 0 and error > 0 and math.isfinite(error):
            measured = 2 * probe.slope * math.log(error / expected)
            self._log_error = self._gate.memory * self._log_error + (1 - self._gate.memory) * measured

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        raise AssertionError("AdaCorrection observes no change")

    @property
    def difficulty(self) -> float:
        """Squared error of this request's predictions over that of calibration's, to the power of the adaptivity."""
        return math.exp(self._gate.adaptivity * self._log_error)


def controller_for_policy(policy: Policy, run: Run, calibration: Calibration | None) -> Controller:
    """Return a fresh controller for one request.

    Args:
        policy: Its predictor must be the calibration's where it is calibrated.
        run: The request.
        calibration: Needed where `policy.needs_calibration`.

    Raises:
        CalibrationError: If the calibration is missing or was made with another predictor.
    """
    gate = policy.gate
    if isinstance(gate, NoGate | FewerStepsGate):
        return StaticController(policy, run, frozenset(range(run.steps)), "every step is evaluated")
    if isinstance(gate, IntervalGate):
        steps = frozenset(range(0, run.steps, gate.interval))
        return StaticController(policy, run, steps, f"every {gate.interval} steps")
    if isinstance(gate, PaperGate) and not gate.lazy:
        return PaperController(policy, gate, run, None)
    if calibration is None:
        raise CalibrationError(f"policy {policy.name} needs a calibration. Make one with adacorr-calibrate.")
    if isinstance(gate, PaperGate):
        return PaperController(policy, gate, run, calibration.paper_floors)
    if calibration.predictor != policy.predictor:
        raise CalibrationError(
            f"policy {policy.name} predicts by {policy.predictor.label}, the calibration was made for "
            f"{calibration.predictor.label}. Calibrate with --predictor {policy.predictor.kind.value} "
            f"--order {policy.predictor.order}."
        )
    if isinstance(gate, ScheduleGate):
        planner = planner_for(calibration, policy.guards)
        evaluated = planner.plan(planner.price(gate.speedup)).evaluated_steps()
        return StaticController(policy, run, frozenset(evaluated), "calibrated schedule")
    return AdaCorrectionController(policy, gate, run, calibration)


def guard_reason(policy: Policy, run: Run, step: int, block: int, history: SlotHistory) -> str | None:
    return policy.guards.reason(step=step, steps=run.steps, block=block, age=history.age(step))


def paper_score(signals: Signals, lambda_: float) -> float:
    """S = Δ_temp² + λ·Δ_spatial (METHOD §1)."""
    return signals.paper_temporal**2 + lambda_ * signals.paper_spatial


def robust_score(signals: Signals) -> float:
    """√Ŝ with Ŝ = Δ̂_t² + Δ̂_s² (METHOD §3); Δ̂_t is the larger of its RMS and half its 95th-percentile token."""
    return math.hypot(max(signals.relative_offset, 0.5 * signals.relative_offset_p95), signals.spatial_change)


def weight_from_estimate(estimate: float, thresholds: tuple[float, float, float]) -> float:
    """W = clip(γ·(ê − τ_reuse) / (τ_recompute − τ_reuse), 0, 1), as the blend part computes it too.

    Args:
        estimate: ê, finite.
        thresholds: τ_reuse, τ_recompute, γ. Where the two meet, w is a step, and 1 on it.
    """
    reuse, recompute, gamma = thresholds
    if recompute <= reuse:
        return 1.0 if estimate >= reuse else 0.0
    return min(1.0, max(0.0, gamma * (estimate - reuse) / (recompute - reuse)))


def _gap(history: SlotHistory) -> int:
    return history.steps[0] - history.steps[1] if len(history.steps) > 1 else 1
