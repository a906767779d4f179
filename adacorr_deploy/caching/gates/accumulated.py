"""Gates that accumulate an estimate of change from step to step: TeaCache, EasyCache, MagCache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from adacorr_deploy.caching.decisions import Decision, Kept, Observation, Observed, Signals, SlotHistory
from adacorr_deploy.caching.gates.rule import GateSettings, Lookups, Rule, Threshold, reuse_if
from adacorr_deploy.caching.granularity import Granularity
from adacorr_deploy.caching.scores import largest

_MODULATED: Final = Observation(what=Observed.MODULATED, kept=Kept.STEP)
_INPUT: Final = Observation(what=Observed.INPUT, kept=Kept.STEP)


class TeaCacheGate(GateSettings):
    """TeaCache (arXiv 2411.19108): reuse while Σ f(L1rel) < δ, summed over the steps since the last evaluation.

    L1rel = mean|m_t − m_{t−1}| / mean|m_{t−1}| of the first block's modulated input m, from one step to the next; f is
    the calibrated polynomial of degree 4 that turns a change of it into one of the output. An evaluation sets the sum
    to 0.
    """

    signal: ClassVar[str] = "change of the modulated input, rescaled"
    paper: ClassVar[str] = "2411.19108"
    knob: ClassVar[str] = "threshold"
    knob_meaning: ClassVar[str] = "δ, the accumulated change from which on it is evaluated"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.RANGE, Granularity.STEP)
    quantity: ClassVar[str] = "output_change"
    observes: ClassVar[bool] = True

    kind: Literal["teacache"] = "teacache"
    threshold: Threshold = 0.2

    def rule(self, lookups: Lookups) -> Rule:
        return TeaCacheRule(self, lookups.output_change())


class EasyCacheGate(GateSettings):
    """EasyCache (arXiv 2507.02860): reuse while Σ k·‖x_t − x_{t−1}‖₁ / ‖v‖₁ < τ, summed since the last evaluation.

    k = ‖v_i − v_j‖₁ / ‖x_i − x_j‖₁ is measured at each evaluation i against the one before, j. Here x are the tokens
    that enter the span and v is what it keeps: its residual (published: latents and the model's output). ‖x_i − x_j‖ is
    the sum of the steps' changes between the two, and ‖v‖ that of evaluation j: what was measured of v by then.
    """

    signal: ClassVar[str] = "change of the input times the measured gain"
    paper: ClassVar[str] = "2507.02860"
    knob: ClassVar[str] = "threshold"
    knob_meaning: ClassVar[str] = "τ, the accumulated estimate from which on it is evaluated"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.RANGE, Granularity.STEP)
    observes: ClassVar[bool] = True

    kind: Literal["easycache"] = "easycache"
    threshold: Threshold = 0.05

    def rule(self, lookups: Lookups) -> Rule:
        return EasyCacheRule(self)


class MagCacheGate(GateSettings):
    """MagCache (arXiv 2506.09045): reuse while Σ |1 − Π γ| ≤ τ over at most K steps in a row.

    γ_t = mean over tokens of ‖r_t‖ / ‖r_{t−1}‖ is calibrated; product and sum begin anew at an evaluation. The first
    `retention` of all steps are evaluated.
    """

    signal: ClassVar[str] = "calibrated ratio of residual magnitudes"
    paper: ClassVar[str] = "2506.09045"
    knob: ClassVar[str] = "threshold"
    knob_meaning: ClassVar[str] = "τ, the largest accumulated error that is reused"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.RANGE,)
    quantity: ClassVar[str] = "magnitude_ratios"

    kind: Literal["magcache"] = "magcache"
    threshold: Threshold = 0.06
    max_skipped: Annotated[int, Field(ge=1, le=100)] = 3
    retention: Annotated[float, Field(ge=0, le=1)] = 0.2

    def rule(self, lookups: Lookups) -> Rule:
        return MagCacheRule(self, lookups.magnitude_ratios())

    def retained_steps(self, steps: int) -> int:
        return int(self.retention * steps + 0.5)


class TeaCacheRule(Rule):
    """See `TeaCacheGate`."""

    def __init__(self, gate: TeaCacheGate, rescale: Callable[[float], float]) -> None:
        self._threshold = gate.threshold
        self._rescale = rescale
        self._accumulated: dict[int, float] = {}

    def observation(self, span: int) -> Observation | None:
        return _MODULATED

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        change = largest(branch.relative_l1 for branch in signals)
        rescaled = self._rescale(change) if math.isfinite(change) else math.nan  # NaN forces an evaluation
        self._accumulated[span] = self._accumulated.get(span, 0.0) + rescaled

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        accumulated = self._accumulated.get(span, 0.0)
        return reuse_if(accumulated < self._threshold, "accumulated change", accumulated)

    def settle(self, step: int, span: int, *, evaluated: bool) -> None:
        if evaluated:
            self._accumulated[span] = 0.0


@dataclass(slots=True)
class _Gain:
    """What EasyCache knows of one branch of one span."""

    input_change: float = 0.0  # Σ ‖x_t − x_{t−1}‖₁ since the last evaluation, this step's last
    measured_over: float = 0.0  # the same, up to the evaluation whose change is still to come
    relative: float | None = None  # k / ‖v‖₁
    accumulated: float = 0.0


class EasyCacheRule(Rule):
    """See `EasyCacheGate`."""

    observes_under_guards = True  # the gain is measured in the warm-up

    def __init__(self, gate: EasyCacheGate) -> None:
        self._threshold = gate.threshold
        self._gains: dict[int, list[_Gain]] = {}

    def observation(self, span: int) -> Observation | None:
        return _INPUT

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        gains = self._gains.setdefault(span, [_Gain() for _ in signals])
        for gain, branch in zip(gains, signals, strict=True):
            gain.input_change += branch.change_l1
            if gain.relative is not None:
                gain.accumulated += gain.relative * branch.change_l1

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        gains = self._gains.get(span, [])
        if not gains or any(gain.relative is None for gain in gains):
            return reuse_if(False, "no gain measured yet")
        accumulated = largest(gain.accumulated for gain in gains)
        return reuse_if(accumulated < self._threshold, "accumulated change", accumulated)

    def settle(self, step: int, span: int, *, evaluated: bool) -> None:
        for gain in self._gains.get(span, []) if evaluated else []:
            gain.measured_over, gain.input_change, gain.accumulated = gain.input_change, 0.0, 0.0

    def observes_change(self, step: int, span: int) -> bool:
        return True

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        for gain, branch in zip(self._gains.get(span, []), signals, strict=False):
            norm = gain.measured_over * branch.reference_l1
            gain.relative = branch.change_l1 / norm if 0 < norm < math.inf else None


@dataclass(slots=True)
class _Magnitude:
    """What MagCache accumulates since the last evaluation."""

    ratio: float = 1.0
    error: float = 0.0
    skipped: int = 0


@dataclass(slots=True)
class MagCacheRule(Rule):
    """See `MagCacheGate`.

    Attributes:
        gate: Its settings.
        ratios: γ, per step.
    """

    gate: MagCacheGate
    ratios: Sequence[float]
    _spans: dict[int, _Magnitude] = field(default_factory=dict)

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        if step < self.gate.retained_steps(len(self.ratios)):
            return reuse_if(False, "retention")
        now = self._spans.setdefault(span, _Magnitude())
        now.ratio *= self.ratios[step]
        now.skipped += 1
        now.error += abs(1.0 - now.ratio)
        within = now.error <= self.gate.threshold and now.skipped <= self.gate.max_skipped
        return reuse_if(within, "accumulated magnitude error", now.error)

    def settle(self, step: int, span: int, *, evaluated: bool) -> None:
        if evaluated:
            self._spans[span] = _Magnitude()
