"""What a policy's controller tells the loop: evaluate, reuse or correct a block, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class Action(str, Enum):
    EVALUATE = "evaluate"  # the block's engine is launched and its slot refilled
    REUSE = "reuse"  # the engine is not launched: the slot's prediction stands for it
    CORRECT = "correct"  # the engine is launched, and its output blended with the prediction


class Placement(str, Enum):
    """When the measurements that a policy decides with are read."""

    BLOCK = "block"  # before each block
    STEP = "step"  # once, at the step's first block; it decides for all
    LAG = "lag"  # those of the step before: a GPU never waits for the host


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """How far a block's input is from the one its slot was filled with, for one branch; the maths is in `plugins`."""

    relative_offset: float  # Δ̂_t of METHOD §3: RMS over tokens of ‖x − x̄‖ / (‖x̄‖ + ε)
    relative_offset_p95: float  # the same quantity at the 95th-percentile token
    spatial_change: float  # Δ̂_s: |σ̄(x) / σ̄(x̄) − 1|
    paper_temporal: float  # Δ_temp of the paper: mean over tokens of ‖x − x̄‖
    paper_spatial: float  # Δ_spatial of the paper: mean over tokens of the channel standard deviation of x

    @property
    def finite(self) -> bool:
        return math.isfinite(self.relative_offset + self.spatial_change + self.paper_temporal + self.paper_spatial)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One block's action at one step; `score` and `weight` are None where the policy computes none.

    A correction has both, and `thresholds` (τ_reuse, τ_recompute, γ): the blend weighs by clip(γ·(score − τ_reuse) /
    (τ_recompute − τ_reuse), 0, 1), which is `weight`.
    """

    action: Action
    reason: str
    score: float | None = None
    weight: float | None = None
    thresholds: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A slot's estimate: x + Σⱼ cⱼ Σᵤ gⱼᵤ ⊙ hⱼᵤ over its evaluations j (newest first) and units u.

    Of a slot that holds the model's output oⱼ, it is Σⱼ cⱼ·oⱼ, and `gate_steps` says nothing. In a correction, x is the
    block's present input, or, with `onto_kept_input`, the input of the last evaluation: the paper's cached output.

    `gate_steps[j]` is the step whose adaLN gates weigh evaluation j: the present step for `gated` predictors, the step
    of evaluation j itself for predictors of the residual.
    """

    coefficients: tuple[float, ...]
    gate_steps: tuple[int, ...]
    onto_kept_input: bool = False


@dataclass(slots=True)
class SlotHistory:
    """When a slot was filled: steps of its last evaluations, newest first."""

    capacity: int
    steps: list[int] = field(default_factory=list)

    def record(self, step: int) -> None:
        self.steps.insert(0, step)
        del self.steps[self.capacity :]

    def clear(self) -> None:
        self.steps.clear()

    def age(self, step: int) -> int | None:
        """Steps since the last evaluation: None before the first."""
        return step - self.steps[0] if self.steps else None


class Controller(Protocol):
    """Decides for one request. Made anew for each; the loop calls it once per block and step, in order."""

    @property
    def whole_steps(self) -> bool:
        """Whether a step is decided at once, its prediction standing for the model's output.

        `decide` is then called with block 0 once a step, and histories are those of the output.
        """
        ...

    @property
    def lags(self) -> bool:
        """Whether it decides with what an earlier step measured, so that no step waits for a GPU.

        `decide` then gets the signals of the step before, or None if the slot was filled since, and errors come two
        steps late.
        """
        ...

    def keeps_reference(self, block: int) -> bool:
        """Whether the block's slot keeps its input at the last evaluation, for signals and corrections (one copy)."""
        ...

    def needs_signals(self, step: int, block: int, history: SlotHistory) -> bool:
        """Whether `decide` wants the signals of this block's input (one memory-bound launch)."""
        ...

    def decide(self, step: int, block: int, history: SlotHistory, signals: Sequence[Signals] | None) -> Decision:
        """Return the action. `signals` holds one entry per branch, or is None if they were not asked for."""
        ...

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        """Return how the slot stands for the block at `step`; called for REUSE and CORRECT, and to measure errors."""
        ...

    def measures_error(self, step: int, block: int, history: SlotHistory) -> bool:
        """Whether the loop should compare the prediction with the fresh output of a block that is evaluated now."""
        ...

    def record_error(self, step: int, block: int, error: float) -> None:
        """Take the relative error of the prediction of a block that was evaluated (see `measures_error`)."""
        ...
