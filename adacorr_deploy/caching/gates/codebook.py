"""AdaCache: how many steps are skipped follows from how fast what is kept changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adacorr_deploy.caching.decisions import Decision, Signals, SlotHistory
from adacorr_deploy.caching.gates.rule import GateSettings, Lookups, Rule, reuse_if
from adacorr_deploy.caching.scores import largest
from adacorr_deploy.core.errors import PolicyError

_Share = Annotated[float, Field(ge=0, le=1)]
Entry = tuple[Annotated[float, Field(gt=0, le=1000)], Annotated[int, Field(ge=1, le=1000)]]

_FAST: Final = ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1))  # published for 30 steps


class MotionRegularisation(BaseModel):
    """AdaCache's factor on the distance for what moves, of videos.

    m = (motion / reference)^exponent / divisor, where motion is ‖r[1:] − r[:−1]‖₁ / (‖r[1:]‖₁ + ‖r[:−1]‖₁) between
    frames of the residual r; the distance is multiplied by m + |gradient · (m − m_before) / rate|. Outside the window m
    is 1. The defaults are the authors'.

    Attributes:
        window: First and last step at which motion counts, as shares of all steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reference: Annotated[float, Field(gt=0, le=10)] = 0.385
    exponent: Annotated[float, Field(gt=0, le=16)] = 8.0
    divisor: Annotated[float, Field(gt=0, le=100)] = 1.0
    gradient: Annotated[float, Field(ge=0, le=100)] = 10.0
    window: tuple[_Share, _Share] = (0.1, 0.9)

    def factor(self, motion: float | None, *, before: float, rate: int) -> tuple[float, float]:
        """Return what the distance is multiplied with, and m, which is `before` of the next evaluation.

        Args:
            motion: Of the residual that was just evaluated, 0 … 1; None outside the window.
            before: m of the evaluation before; 1 at first.
            rate: Steps between the two.
        """
        present = 1.0 if motion is None else (motion / self.reference) ** self.exponent / self.divisor
        return present + abs(self.gradient * (present - before) / rate), present


class AdaCacheGate(GateSettings):
    """AdaCache (arXiv 2411.02397): after an evaluation, the next one is a codebook's number of steps away.

    distance = ‖r̄ − r‖₁ / ‖r̄‖₁ / k, of what is kept of this evaluation and of the one before, k steps earlier. The first
    entry (limit, steps) whose limit is above it gives the next rate, else the last. Published: of the attention result
    of a middle layer; here of what the span keeps.

    Attributes:
        codebook: Entries (limit, steps), limits rising. The default is the published one for 30 steps.
        tolerance: Multiplies the limits.
        motion: Skips fewer steps where more moves, and where that changes; needs frames, so a model of videos.
    """

    signal: ClassVar[str] = "change of what is kept, per step"
    paper: ClassVar[str] = "2411.02397"
    knob: ClassVar[str] = "tolerance"
    knob_meaning: ClassVar[str] = "a factor on the codebook's limits"

    kind: Literal["adacache"] = "adacache"
    codebook: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=32)] = _FAST
    tolerance: Annotated[float, Field(gt=0, le=1000)] = 1.0
    motion: MotionRegularisation | None = None

    def rule(self, lookups: Lookups) -> Rule:
        if self.motion is not None and lookups.run.frames == 1:
            raise PolicyError(
                f"policy {lookups.policy}: gate.motion is measured between frames, and this run makes images, or "
                "clips of one frame. Leave it out."
            )
        return AdaCacheRule(self, lookups.run.steps)

    @model_validator(mode="after")
    def _limits_rise(self) -> AdaCacheGate:
        for (lower, _), (upper, _) in itertools.pairwise(self.codebook):
            if upper <= lower:
                raise ValueError(f"codebook has the limit {upper:g} after {lower:g}, allowed are rising limits")
        return self

    def rate(self, distance: float) -> int:
        """Return how many steps after this evaluation the next one is."""
        for limit, steps in self.codebook:
            if distance < limit * self.tolerance:
                return steps
        return self.codebook[-1][1]


class AdaCacheRule(Rule):
    """See `AdaCacheGate`."""

    def __init__(self, gate: AdaCacheGate, steps: int) -> None:
        self._gate = gate
        self._steps = steps
        self.observes_motion = gate.motion is not None
        self._motions: dict[int, float] = {}  # m of the last evaluation
        self._rates: dict[int, int] = {}
        self._distances: dict[int, float] = {}
        self._evaluated: dict[int, tuple[int, int]] = {}  # by span: step of the last evaluation, and steps up to it

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        due = history.steps[0] + self._rates.get(span, 1)
        return reuse_if(step < due, "codebook", self._distances.get(span))

    def settle(self, step: int, span: int, *, evaluated: bool) -> None:
        if evaluated:
            before, _ = self._evaluated.get(span, (step - 1, 1))
            self._evaluated[span] = step, step - before

    def observes_change(self, step: int, span: int) -> bool:
        return True

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        _, apart = self._evaluated[span]  # not always the rate: guards and corrections evaluate at other steps
        distance = largest(branch.relative_l1 for branch in signals) / apart
        if self._gate.motion is not None:
            distance *= self._motion_factor(self._gate.motion, step, span, signals)
        self._distances[span] = distance
        self._rates[span] = self._gate.rate(distance) if math.isfinite(distance) else 1

    def _motion_factor(
        self, regularisation: MotionRegularisation, step: int, span: int, signals: Sequence[Signals]
    ) -> float:
        first, last = (share * self._steps for share in regularisation.window)
        motion = largest(branch.motion for branch in signals if branch.motion is not None)
        factor, self._motions[span] = regularisation.factor(
            motion if first <= step <= last else None,
            before=self._motions.get(span, 1.0),
            rate=self._evaluated[span][1],
        )
        return factor
