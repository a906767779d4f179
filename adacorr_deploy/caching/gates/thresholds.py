"""Gates that compare one step's signal with a limit: FBCache, DBCache, DBPrune, FastCache, LazyDiT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from adacorr_deploy.caching.decisions import Decision, Kept, Observation, Observed, Signals, SlotHistory
from adacorr_deploy.caching.gates.rule import GateSettings, Lookups, Rule, Threshold, reuse_if
from adacorr_deploy.caching.granularity import Granularity
from adacorr_deploy.caching.scores import largest

_RESIDUAL: Final = Observation(what=Observed.RESIDUAL, kept=Kept.EVALUATION)
_INPUT: Final = Observation(what=Observed.INPUT, kept=Kept.EVALUATION)
_STEP_INPUT: Final = Observation(what=Observed.INPUT, kept=Kept.STEP)
_PRUNE_MEAN_OF: Final = 5  # of a step's measured changes, DBPrune's dynamic limit takes the first so many


class FirstBlocksGate(GateSettings):
    """FBCache (ParaAttention) and DBCache (cache-dit): reuse while the first blocks' residual changed by at most τ.

    L1rel = mean|r − r̄| / mean|r̄| of what the first Fn blocks add, r̄ at the last evaluation of the rest: the reference
    moves only then. FBCache is Fn = 1. Fn and Bn stand in the policy's `spans`, a warm-up and the longest run of reused
    steps in its `guards`.

    Attributes:
        threshold: τ.
        max_reused_steps: Steps of a run that may be reused in all; None for no limit (DBCache's max_cached_steps).
    """

    signal: ClassVar[str] = "change of the first blocks' residual"
    knob: ClassVar[str] = "threshold"
    knob_meaning: ClassVar[str] = "the largest relative change that is reused"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.RANGE,)
    observes: ClassVar[bool] = True

    kind: Literal["first-blocks"] = "first-blocks"
    threshold: Threshold = 0.08
    max_reused_steps: Annotated[int, Field(ge=0, le=1000)] | None = None

    def rule(self, lookups: Lookups) -> Rule:
        return FirstBlocksRule(self)


class PruneGate(GateSettings):
    """DBPrune (cache-dit): each block by itself is reused while its input changed by at most τ since its evaluation.

    L1rel = mean|x − x̄| / mean|x̄|. With `dynamic` the limit is 1.25 times the mean of the first five changes that this
    step measured, where that is above τ and below 2τ.
    """

    signal: ClassVar[str] = "change of each block's input"
    knob: ClassVar[str] = "threshold"
    knob_meaning: ClassVar[str] = "the largest relative change that is reused"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)
    observes: ClassVar[bool] = True

    kind: Literal["prune"] = "prune"
    threshold: Threshold = 0.08
    dynamic: bool = False
    relax: Annotated[float, Field(ge=1, le=10)] = 1.25

    def rule(self, lookups: Lookups) -> Rule:
        return PruneRule(self)

    def limit(self, changes: Sequence[float]) -> float:
        """Return the limit after a step has measured `changes`, in order; the last is the one that it is for."""
        measured = [change for change in changes[:-1][:_PRUNE_MEAN_OF] if change > 0]
        if not self.dynamic or not measured:
            return self.threshold
        relaxed = self.relax * sum(measured) / len(measured)
        return relaxed if self.threshold < relaxed < 2 * self.threshold else self.threshold


class FastCacheGate(GateSettings):
    """FastCache (arXiv 2505.20353): reuse a block while δ² ≤ s²·χ²_{ND,1−α} / ND.

    δ = ‖h_t − h_{t−1}‖ / ‖h_{t−1}‖ of the block's input, from one step to the next. As published (s = 1) the limit is
    close to 1 for any α and any real N·D, so that it passes below a change of 100 %; `scale` s makes it of use, and is
    the ratio threshold of the authors' code (0.05 there).
    """

    signal: ClassVar[str] = "chi-squared test on the change of each block's input"
    paper: ClassVar[str] = "2505.20353"
    knob: ClassVar[str] = "scale"
    knob_meaning: ClassVar[str] = "s, the largest relative change that is reused; 1 as published"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)
    observes: ClassVar[bool] = True

    kind: Literal["fastcache"] = "fastcache"
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    scale: Threshold = 1.0

    def rule(self, lookups: Lookups) -> Rule:
        return FastCacheRule(self, lookups.run.elements)

    def limit(self, elements: int) -> float:
        """Return the largest δ that is reused, for N·D elements."""
        return self.scale * math.sqrt(chi_square_quantile_per_degree(1 - self.alpha, elements))


class LazyGate(GateSettings):
    """LazyDiT (arXiv 2412.12444): reuse a part where its trained gate says so, sigmoid(w·mean(m) + b) ≥ θ.

    m is the part's modulated input, its mean taken over the tokens; w and b come from the profile, fitted per part to
    the measured error of reusing it (published: trained per step, with the model, summed over the tokens).
    """

    signal: ClassVar[str] = "trained linear probe of each part's modulated input"
    paper: ClassVar[str] = "2412.12444"
    knob: ClassVar[str] = "threshold"
    knob_meaning: ClassVar[str] = "θ, the least probability of being safe that is reused, 0 … 1"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)
    quantity: ClassVar[str] = "gates"
    observes: ClassVar[bool] = True

    kind: Literal["lazy"] = "lazy"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

    def rule(self, lookups: Lookups) -> Rule:
        return LazyRule(self, lookups.probes())


def chi_square_quantile_per_degree(probability: float, degrees: int) -> float:
    """Return χ²_{k,p} / k by Wilson and Hilferty's cube, (1 − 2/9k + z_p √(2/9k))³, at least 0.

    Its relative error is below 1e-3 from k = 30 on and falls with k; a block's k = N·D is thousands.
    """
    spread = 2.0 / (9.0 * degrees)
    root = 1.0 - spread + NormalDist().inv_cdf(probability) * math.sqrt(spread)
    return float(max(root, 0.0) ** 3)


class FirstBlocksRule(Rule):
    """See `FirstBlocksGate`. Spans that keep nothing are never asked."""

    def __init__(self, gate: FirstBlocksGate) -> None:
        self._gate = gate
        self._change = math.inf
        self._reused = 0

    def observation(self, span: int) -> Observation | None:
        return _RESIDUAL

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self._change = largest(branch.relative_l1 for branch in signals)

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        if self._gate.max_reused_steps is not None and self._reused >= self._gate.max_reused_steps:
            return reuse_if(False, "reused steps spent", self._change)
        return reuse_if(self._change <= self._gate.threshold, "first blocks' change", self._change)

    def settle(self, step: int, span: int, *, evaluated: bool) -> None:
        self._reused += not evaluated


class PruneRule(Rule):
    """See `PruneGate`."""

    def __init__(self, gate: PruneGate) -> None:
        self._gate = gate
        self._step = -1
        self._changes: list[float] = []  # measured in this step, in the spans' order

    def observation(self, span: int) -> Observation | None:
        return _INPUT

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        if step != self._step:
            self._step, self._changes = step, []
        self._changes.append(largest(branch.relative_l1 for branch in signals))

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        change = self._changes[-1]
        return reuse_if(change <= self._gate.limit(self._changes), "block's change", change)


class FastCacheRule(Rule):
    """See `FastCacheGate`."""

    def __init__(self, gate: FastCacheGate, elements: int) -> None:
        self._limit = gate.limit(elements)
        self._change = math.inf

    def observation(self, span: int) -> Observation | None:
        return _STEP_INPUT

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self._change = largest(math.sqrt(branch.relative_square) for branch in signals)

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        return reuse_if(self._change <= self._limit, "χ² test", self._change)


class LazyRule(Rule):
    """See `LazyGate`.

    Args:
        gate: Its settings.
        probes: One per span.
    """

    def __init__(self, gate: LazyGate, probes: Sequence[Observation]) -> None:
        self._threshold = gate.threshold
        self._probes = probes
        self._safe = 0.0

    def observation(self, span: int) -> Observation | None:
        return self._probes[span]

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self._safe = -largest(math.nan if branch.probe is None else -sigmoid(branch.probe) for branch in signals)

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        return reuse_if(self._safe >= self._threshold, "trained gate", self._safe)


def sigmoid(logit: float) -> float:
    """1 / (1 + e^−logit), without overflow."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    odds = math.exp(logit)
    return odds / (1.0 + odds)
