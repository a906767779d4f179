"""Gates whose masks follow from error tables of a profile: SmoothCache and Block Caching."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from adacorr_deploy.caching.gates.rule import ErrorTable, GateSettings, Lookups, Rule, Threshold
from adacorr_deploy.caching.gates.steps import MaskRule
from adacorr_deploy.caching.granularity import Granularity

_WHOLE: Final = "block"


class SmoothCacheGate(GateSettings):
    """SmoothCache (arXiv 2411.10510): all parts of a kind are reused as long as their calibrated error is at most α.

    At an evaluation of step i, the largest n ≤ `max_skipped` is taken for which the relative L1 error of step i's
    result at step i + n is at most α, and the next n steps are reused. As published, the last step is evaluated.
    """

    signal: ClassVar[str] = "calibrated error by kind of part"
    paper: ClassVar[str] = "2411.10510"
    knob: ClassVar[str] = "alpha"
    knob_meaning: ClassVar[str] = "α, the largest calibrated error that is reused"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)
    quantity: ClassVar[str] = "unit_errors"

    kind: Literal["smoothcache"] = "smoothcache"
    alpha: Threshold = 0.18
    max_skipped: Annotated[int, Field(ge=1, le=64)] = 3

    def rule(self, lookups: Lookups) -> Rule:
        """Of parts that are whole blocks, the largest error of their units counts."""
        run, errors = lookups.run, lookups.unit_errors()
        kinds = run.kinds or (_WHOLE,) * run.blocks
        tables = {kind: errors[kind] if run.halves else functools.reduce(_larger, errors.values()) for kind in {*kinds}}
        schedules = {
            kind: smooth_schedule(table, alpha=self.alpha, max_skipped=self.max_skipped)
            for kind, table in tables.items()
        }
        mask = [[schedules[kind][step] for kind in kinds] for step in range(run.steps)]
        return MaskRule(mask, "calibrated error")


class BlockCachingGate(GateSettings):
    """Block Caching (arXiv 2312.03209): a block is reused until its calibrated changes add up to more than δ.

    With the last evaluation at step a, step b is reused while Σ_{t=a+1…b} L1rel(block, t) ≤ δ, where L1rel is the
    relative L1 change of what the block adds, from one step to the next.
    """

    signal: ClassVar[str] = "calibrated change by block"
    paper: ClassVar[str] = "2312.03209"
    knob: ClassVar[str] = "delta"
    knob_meaning: ClassVar[str] = "δ, the accumulated change from which on a block is evaluated"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)
    quantity: ClassVar[str] = "part_errors"

    kind: Literal["block-caching"] = "block-caching"
    delta: Threshold = 0.5

    def rule(self, lookups: Lookups) -> Rule:
        tables = lookups.part_errors()
        columns = [accumulated_schedule([row[0] for row in table], delta=self.delta) for table in tables]
        return MaskRule(list(zip(*columns, strict=True)), "calibrated change")


def smooth_schedule(errors: ErrorTable, *, alpha: float, max_skipped: int) -> list[bool]:
    """Return which steps are evaluated, by SmoothCache's scan.

    Args:
        errors: `errors[step][age − 1]`, in [0, ∞]; infinite where the age reaches before the first step.
        alpha: The largest error that is reused.
        max_skipped: The longest run of reused steps.
    """
    steps = len(errors)
    evaluated = [False] * steps
    step = 0
    while step < steps:
        evaluated[step] = True
        ages = range(min(max_skipped, len(errors[0]), steps - 1 - step), 0, -1)
        step += 1 + next((age for age in ages if errors[step + age][age - 1] <= alpha), 0)
    evaluated[-1] = True
    return evaluated


def accumulated_schedule(changes: Sequence[float], *, delta: float) -> list[bool]:
    """Return which steps are evaluated, by Block Caching's sum.

    Args:
        changes: Relative L1 change from the step before, per step; the first step's is not read.
        delta: The largest sum that is reused.
    """
    evaluated, accumulated = [True], 0.0
    for change in itertools.islice(changes, 1, None):
        accumulated += change
        evaluated.append(not accumulated <= delta)
        if evaluated[-1]:
            accumulated = 0.0
    return evaluated


def _larger(one: ErrorTable, other: ErrorTable) -> ErrorTable:
    return [[max(pair) for pair in zip(*rows, strict=True)] for rows in zip(one, other, strict=True)]
