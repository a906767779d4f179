"""What a policy's controller tells the loop: which spans of blocks there are, what is done with each, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from adacorr_deploy.caching.revision import Revision


class Action(str, Enum):
    EVALUATE = "evaluate"  # the block's engine is launched and its slot refilled
    REUSE = "reuse"  # the engine is not launched: the slot's prediction stands for it
    CORRECT = "correct"  # the engine is launched, and its output blended with the prediction


class Placement(str, Enum):
    """When the measurements that a policy decides with are read."""

    BLOCK = "block"  # before each block
    STEP = "step"  # once, at the step's first block; it decides for all
    LAG = "lag"  # those of the step before: a GPU never waits for the host
    DEVICE = "device"  # before each block, by the GPU itself, in a graph


class SpanCache(str, Enum):
    """What a span keeps of an evaluation."""

    NONE = "none"  # nothing: it is evaluated at every step
    UNITS = "units"  # of one block part: its attention and MLP results before their adaLN gates
    RESIDUAL = "residual"  # what the span added to its input, (R, N, D)
    OUTPUT = "output"  # of one span over the whole step: the model's guided output


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive block parts, first … stop − 1, that are evaluated or reused as one."""

    first: int
    stop: int
    cache: SpanCache

    @property
    def parts(self) -> range:
        return range(self.first, self.stop)


class Observed(str, Enum):
    """What a span's signals are taken of."""

    INPUT = "input"  # the tokens that enter the span
    MODULATED = "modulated"  # they after normalisation, shift and scale of the span's first unit
    RESIDUAL = "residual"  # what the span before it has just added
    PROBE = "probe"  # a linear probe of MODULATED's mean over tokens


class Kept(str, Enum):
    """With which earlier one it is compared. A probe is compared with none."""

    EVALUATION = "evaluation"  # that of the span's last evaluation
    STEP = "step"  # that of the step before, whatever was done at it


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the loop watches of a span; it costs nothing at the steps for which no signals are asked.

    Attributes:
        what: The tensor.
        kept: The earlier one that it is compared with. With `STEP` the loop keeps a copy at every step.
        weights: Of a probe, one for each of the D channels, in the order of the width; else empty.
        bias: Of a probe, added to the weighted mean.
    """

    what: Observed
    kept: Kept = Kept.EVALUATION
    weights: tuple[float, ...] = ()
    bias: float = 0.0

    @property
    def compared(self) -> bool:
        """Whether there is an earlier one that it is compared with."""
        return self.what is not Observed.PROBE


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """Per channel, (D,) each: a span's estimate becomes x + scale ⊙ Σⱼ cⱼhⱼ + shift."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """How far what is observed, x, is from the kept x̄, for one branch; the maths is in `plugins`."""

    relative_offset: float  # Δ̂_t of METHOD §3: RMS over tokens of ‖x − x̄‖ / (‖x̄‖ + ε)
    relative_offset_p95: float  # the same quantity at the 95th-percentile token
    spatial_change: float  # Δ̂_s: |σ̄(x) / σ̄(x̄) − 1|
    paper_temporal: float  # Δ_temp of the paper: mean over tokens of ‖x − x̄‖
    paper_spatial: float  # Δ_spatial of the paper: mean over tokens of the channel standard deviation of x
    change_l1: float = math.nan  # mean over tokens and channels of |x − x̄|; of a branch, the mean over its images
    reference_l1: float = math.nan  # mean of |x̄|
    change_square: float = math.nan  # mean of (x − x̄)²
    reference_square: float = math.nan  # mean of x̄²
    probe: float | None = None  # the probe's value; None where none was asked for
    motion: float | None = None  # of what is kept, from frame to frame, 0 … 1; None where it was not asked for

    @property
    def finite(self) -> bool:
        return math.isfinite(self.relative_offset + self.spatial_change + self.paper_temporal + self.paper_spatial)

    @property
    def relative_l1(self) -> float:
        """Mean |x − x̄| ÷ mean |x̄|; of a kept x̄ that is all zeros it is 0 or infinite."""
        if self.reference_l1 == 0.0:
            return 0.0 if self.change_l1 == 0.0 else math.inf
        return self.change_l1 / self.reference_l1

    @property
    def relative_square(self) -> float:
        """‖x − x̄‖² ÷ ‖x̄‖²."""
        if self.reference_square == 0.0:
            return 0.0 if self.change_square == 0.0 else math.inf
        return self.change_square / self.reference_square


Measured = Sequence[Sequence[Signals] | None]  # of each of a span's observations, in order: a `Signals` per branch


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One span's action at one step; `score` and `weight` are None where the policy computes none.

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

    Of a slot that holds residuals rⱼ it is x + Σⱼ cⱼ·rⱼ (see `Affine` too), of one that holds the model's output oⱼ it
    is Σⱼ cⱼ·oⱼ; `gate_steps` then says nothing. In a correction, x is the span's present input, or, with
    `onto_kept_input`, the input of the last evaluation: the paper's cached output.

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
    """Decides for one request. Made anew for each; the loop calls it once per span and step, in order."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans that are decided one after another in a step: a partition of the block parts, the same every step.

        A span that keeps the model's output stands alone, for the whole step.
        """
        ...

    @property
    def lags(self) -> bool:
        """Whether it decides with what an earlier step measured, so that no step waits for a GPU.

        `decide` then gets the signals of the step before, or None if the slot was filled since, and errors come two
        steps late.
        """
        ...

    def observations(self, span: int) -> Sequence[Observation]:
        """What signals of a span are taken of, the same throughout the run; each costs only where it is asked for.

        Of the input, where it is the first and compared with that of the last evaluation, a correction may read the
        kept one too (`onto_kept_input`).
        """
        ...

    @property
    def revision(self) -> Revision:
        """How skipped steps are taken again once the next evaluation of a whole step is known."""
        ...

    def affine(self, span: int) -> Affine | None:
        """The calibrated map on a span's estimate, or None for none."""
        ...

    def needs_signals(self, step: int, span: int, history: SlotHistory) -> Sequence[bool]:
        """Say of each of the span's observations whether `decide` wants its signals (a memory-bound launch each).

        It is asked where there is an earlier one to compare with: from the step after the span's first evaluation on.
        """
        ...

    def decide(self, step: int, span: int, history: SlotHistory, signals: Measured) -> Decision:
        """Return the action. `signals` has an entry for each of the span's observations: None if it was not asked."""
        ...

    def prediction(self, step: int, span: int, history: SlotHistory) -> Prediction:
        """Return how the slot stands for the span at `step`; called for REUSE and CORRECT, and to measure errors."""
        ...

    def measures_error(self, step: int, span: int, history: SlotHistory) -> bool:
        """Whether the loop should compare the prediction with the fresh output of a span that is evaluated now."""
        ...

    def record_error(self, step: int, span: int, error: float) -> None:
        """Take the relative error of the prediction of a span that was evaluated (see `measures_error`)."""
        ...

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        """Whether the loop should compare what a span that is evaluated now keeps with what it kept before.

        Asked where the slot holds an earlier evaluation, at least one step old; `history` does not hold this one yet.
        """
        ...

    @property
    def observes_motion(self) -> bool:
        """Whether that comparison should also say how much the fresh one moves (`Signals.motion`)."""
        ...

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        """Take that comparison, one entry per branch: x is the fresh residual or output, x̄ that before."""
        ...


def unit_spans(blocks: int) -> tuple[Span, ...]:
    """Return a span for each of so many block parts, which keeps its units."""
    return tuple(Span(first=block, stop=block + 1, cache=SpanCache.UNITS) for block in range(blocks))


def whole_step_spans(blocks: int) -> tuple[Span, ...]:
    """Return the one span that stands for a whole step by the model's output."""
    return (Span(first=0, stop=blocks, cache=SpanCache.OUTPUT),)


def keeps_output(spans: Sequence[Span]) -> bool:
    """Whether steps are decided at once, the model's output standing for all block parts."""
    return spans[0].cache is SpanCache.OUTPUT
