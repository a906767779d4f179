"""Gates that are known before the run: by step index, or by a mask of steps and parts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from adacorr_deploy.caching.decisions import Decision, SlotHistory
from adacorr_deploy.caching.gates.rule import GateSettings, Lookups, Rule, Speedup, reuse_if
from adacorr_deploy.caching.granularity import Granularity
from adacorr_deploy.caching.run import Run
from adacorr_deploy.core.errors import PolicyError

Mask = Sequence[Sequence[bool]]  # [step][span]: whether it is evaluated


class NoGate(GateSettings):
    """Every block is evaluated at every step."""

    kind: Literal["none"] = "none"

    def rule(self, lookups: Lookups) -> Rule:
        return StepsRule(range(lookups.run.steps), "every step is evaluated")


class FewerStepsGate(GateSettings):
    """The baseline: the sampler takes fewer steps, each evaluated in full."""

    knob: ClassVar[str] = "speedup"
    knob_meaning: ClassVar[str] = "a speed-up from 1 to 20"

    kind: Literal["fewer-steps"] = "fewer-steps"
    speedup: Speedup = 2.0

    def rule(self, lookups: Lookups) -> Rule:
        return StepsRule(range(lookups.run.steps), "every step is evaluated")


class IntervalGate(GateSettings):
    """Evaluate where (step − offset) mod interval = 0.

    Of parts, with `gated`, this is FORA (arXiv 2407.01425); of the middle blocks, with `residual`, the DiT form of
    DeepCache (arXiv 2312.00858); with `residual-taylor` it is TaylorSeer (arXiv 2503.06923).
    """

    signal: ClassVar[str] = "step index"
    knob: ClassVar[str] = "interval"
    knob_meaning: ClassVar[str] = "a whole number of steps"

    kind: Literal["interval"] = "interval"
    interval: Annotated[int, Field(ge=1, le=100)] = 3
    offset: Annotated[int, Field(ge=0, le=100)] = 0

    def rule(self, lookups: Lookups) -> Rule:
        due = {step for step in range(lookups.run.steps) if (step - self.offset) % self.interval == 0}
        return StepsRule(due, f"every {self.interval} steps")


class ScheduleGate(GateSettings):
    """Evaluate the steps of the calibrated shortest path with at most steps ÷ `speedup` evaluations."""

    signal: ClassVar[str] = "calibrated costs"
    knob: ClassVar[str] = "speedup"
    knob_meaning: ClassVar[str] = "a speed-up from 1 to 20"

    kind: Literal["schedule"] = "schedule"
    speedup: Speedup = 2.0

    def rule(self, lookups: Lookups) -> Rule:
        return StepsRule(lookups.scheduled_steps(self.speedup), "calibrated schedule")


def _mask_row(row: str) -> str:
    if set(row) - {"0", "1"} or not 1 <= len(row) <= _MAX_PARTS:
        raise ValueError(f"allowed are 1 to {_MAX_PARTS} digits, each 1 (evaluated) or 0 (reused)")
    return row


_MAX_PARTS = 1000
_MAX_STEPS = 1000
MaskRow = Annotated[str, AfterValidator(_mask_row)]


class MaskGate(GateSettings):
    """A mask made elsewhere: what is evaluated at which step.

    Attributes:
        rows: A string for each step, with a digit for each block part, or one digit for all: 1 is evaluated, 0 reused.
            At the first step everything is.
    """

    signal: ClassVar[str] = "a file's mask"
    knob: ClassVar[str] = "FILE"
    knob_meaning: ClassVar[str] = 'a JSON file, {"rows": ["111", "010", …]}: a string for each step'
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)

    kind: Literal["mask"] = "mask"
    rows: Annotated[tuple[MaskRow, ...], Field(min_length=1, max_length=_MAX_STEPS)]

    @model_validator(mode="after")
    def _rows_fit(self) -> MaskGate:
        if lengths := {len(row) for row in self.rows} - {len(self.rows[0])}:
            raise ValueError(f"rows has strings of {len(self.rows[0])} and of {lengths.pop()} digits, allowed is one")
        if "0" in self.rows[0]:
            raise ValueError("rows reuses a part at the first step, where no slot is filled; its first string is all 1")
        return self

    def rule(self, lookups: Lookups) -> Rule:
        run, wide = lookups.run, len(self.rows[0]) > 1
        _check_size(lookups.policy, "rows", len(self.rows), len(self.rows[0]) if wide else run.blocks, run)
        mask = [[row[part if wide else 0] == "1" for part in range(run.blocks)] for row in self.rows]
        return MaskRule(mask, "mask")


Score = Annotated[float, Field(ge=-1e6, le=1e6)]


class RouterGate(GateSettings):
    """Learning-to-Cache (arXiv 2406.01733): a part is evaluated where its learned router's score is above θ.

    Attributes:
        scores: Router outputs, [step][part]. As published, routers are trained for the halves of blocks, and every
            second step is evaluated in full: all 1 there.
        threshold: θ.
    """

    signal: ClassVar[str] = "a file's router"
    paper: ClassVar[str] = "2406.01733"
    knob: ClassVar[str] = "FILE"
    knob_meaning: ClassVar[str] = 'a JSON file, {"scores": [[1, 1], [0.02, 0.9], …]}: a row for each step'
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)

    kind: Literal["router"] = "router"
    scores: Annotated[
        tuple[Annotated[tuple[Score, ...], Field(min_length=1, max_length=_MAX_PARTS)], ...],
        Field(min_length=1, max_length=_MAX_STEPS),
    ]
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _rows_fit(self) -> RouterGate:
        if lengths := {len(row) for row in self.scores} - {len(self.scores[0])}:
            raise ValueError(f"scores has rows of {len(self.scores[0])} and of {lengths.pop()} parts, allowed is one")
        return self

    def rule(self, lookups: Lookups) -> Rule:
        _check_size(lookups.policy, "scores", len(self.scores), len(self.scores[0]), lookups.run)
        return MaskRule([[score > self.threshold for score in row] for row in self.scores], "router")


def _check_size(policy: str, field: str, steps: int, parts: int, run: Run) -> None:
    if steps != run.steps:
        raise PolicyError(f"policy {policy}: {field} has {steps} steps, the run {run.steps}. Give --steps {steps}.")
    if parts != run.blocks:
        halves = " Routers of halves need a bundle built with --halves." if parts == 2 * run.blocks else ""
        raise PolicyError(f"policy {policy}: {field} is for {parts} block parts, the bundle has {run.blocks}.{halves}")


class StepsRule(Rule):
    """Evaluates every span at given steps."""

    planned = True

    def __init__(self, evaluated: Collection[int], reason: str) -> None:
        self._evaluated = evaluated
        self._reason = reason

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        return reuse_if(step not in self._evaluated, self._reason)


class MaskRule(Rule):
    """Evaluates spans by a mask of steps and spans."""

    planned = True

    def __init__(self, mask: Mask, reason: str) -> None:
        self._mask = mask
        self._reason = reason

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        return reuse_if(not self._mask[step][span], self._reason)
