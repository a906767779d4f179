"""The decision kernel in Python: the oracle of decisions.cu, and the paper's rule in one place."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.block_rules import BlockRule
from adacorr_deploy.plugins.decision_kernels import CASES, NEVER, REASONS, Verdict

_CHECKED: Final = [0, 2, 3, 4]  # columns of the signals that must be finite, as `Signals.finite` has it


def decide(
    rule: BlockRule, signals: NDArray[np.float32], *, images: int, step: int, steps: int, filled: int
) -> Verdict:
    """Return what is done with a block, and why.

    Args:
        rule: Of the block.
        signals: What the signals part gave for its input, (R, 9); not read where a guard holds.
        images: B; R is a multiple of it, the conditional rows first.
        step: Of the run, 0 … steps − 1.
        steps: S.
        filled: The step of the slot's last evaluation, or NEVER.
    """
    age = NEVER if filled == NEVER else step - filled
    if guard := _guard(rule, step, steps, age):
        return _verdict("evaluate", guard, age)
    if not np.isfinite(signals[:, _CHECKED]).all():
        return _verdict("evaluate", "signals not finite", age)
    score = max(_score(rule, signals[first : first + images]) for first in range(0, len(signals), images))
    weight = _weight(rule, score)
    if not rule.lazy:
        return _verdict("correct", "paper: always evaluated", age, score, weight)
    if weight <= rule.epsilon:
        return _verdict("reuse", "weight within epsilon", age, score, weight)
    return _verdict("evaluate" if weight == 1.0 else "correct", "weight above epsilon", age, score, weight)


def _guard(rule: BlockRule, step: int, steps: int, age: int) -> str | None:
    if age == NEVER:
        return "first use"
    if step < rule.warmup_steps:
        return "warm-up"
    if step >= steps - rule.final_steps:
        return "final steps"
    if age > rule.max_age_steps:
        return "maximum age"
    return "protected block" if rule.protected else None


def _score(rule: BlockRule, rows: NDArray[np.float32]) -> float:
    """S of one guidance branch: the means over its images go into the formula."""
    temporal, spatial = (_mean(rows[:, column]) for column in (3, 4))
    return temporal * temporal + rule.lambda_ * spatial


def _mean(values: NDArray[np.float32]) -> float:
    total = 0.0
    for value in values.tolist():  # in order, one by one, as the kernel adds them: sum() may compensate
        total += value
    return total / len(values)


def _weight(rule: BlockRule, score: float) -> float:
    reuse, recompute, gamma = rule.thresholds
    if recompute <= reuse:
        return 1.0 if score >= reuse else 0.0
    return min(1.0, max(0.0, gamma * (score - reuse) / (recompute - reuse)))


def _verdict(case: str, reason: str, age: int, score: float | None = None, weight: float | None = None) -> Verdict:
    return Verdict(action=CASES.index(case), reason=REASONS.index(reason), age=age, score=score, weight=weight)
