"""What a controller has watched of each span: measured against an earlier one, kept, and summed up per branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Controller, Kept, Measured, Observation, Observed, Signals, SlotHistory
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.runtime.workspace import Reading, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watch:
    """One observation of a span, and where the earlier one is kept that it is compared with: None of a probe."""

    number: int
    observation: Observation
    reference: Buffer | None


@dataclass(slots=True, kw_only=True)
class Observer:
    """The observations of one request, in a workspace that was lent to it."""

    space: Workspace
    controller: Controller
    batch: int
    suspect: bool = False  # something that was measured was not finite; whoever looks into it resets it
    _watches: list[list[_Watch]] = field(init=False)  # by span
    _observed: tuple[int, int, Observed, Buffer] | None = None  # step, span and kind of the last one that was computed
    # By span and observation: when the slot was filled, and the signals of the step before.
    _earlier: dict[tuple[int, int], tuple[int, Reading]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._watches = [self._watches_of(span) for span in range(len(self.controller.spans))]

    def _watches_of(self, span: int) -> list[_Watch]:
        kept = iter(self.space.slots.spans[span].references)
        return [
            _Watch(number=number, observation=each, reference=next(kept, None) if each.compared else None)
            for number, each in enumerate(self.controller.observations(span))
        ]

    def signals(self, step: int, span: int, history: SlotHistory) -> Measured:
        """Return what the controller asks for of a span's observations, each one `Signals` per guidance branch.

        One is None where it is not asked for, or there is none.
        """
        watches = self._watches[span]
        if not watches:
            return ()
        if not history.steps:
            return (None,) * len(watches)
        wanted = self.controller.needs_signals(step, span, history)
        # All are launched before the first is read: the host waits for a GPU once.
        readings = [
            self._reading(step, span, watch, history) if asked else None
            for watch, asked in zip(watches, wanted, strict=True)
        ]
        return [
            self._summed(watch, reading) if reading is not None else None
            for watch, reading in zip(watches, readings, strict=True)
        ]

    def keep(self, step: int, span: int, kept: Kept) -> None:
        """Keep what is observed of a span now, if that is what it will be compared with."""
        for watch in self._watches[span]:
            if watch.reference is not None and watch.observation.kept is kept:
                watch.reference.copy_from(self._tensor(step, span, watch.observation.what))

    def _reading(self, step: int, span: int, watch: _Watch, history: SlotHistory) -> Reading | None:
        reading = self._measured(step, span, watch)
        if not self.controller.lags:
            return reading
        return self._of_the_step_before(span, watch.number, history.steps[0], reading)

    def _measured(self, step: int, span: int, watch: _Watch) -> Reading:
        what = watch.observation.what
        if what is Observed.PROBE:
            return self.space.spans.probe(span)
        if watch.reference is None:
            raise EngineError("The slot keeps no reference to compare with. Lend it with one for each observation.")
        tensor = self._tensor(step, span, what)
        # The next request in this workspace may watch something else: the pair is named by both of its buffers.
        return self.space.compare(("observed", span, what.value, watch.reference.address), tensor, watch.reference)

    def _summed(self, watch: _Watch, reading: Reading) -> list[Signals]:
        probes = watch.observation.what is Observed.PROBE
        signals = (probes_of_branches if probes else signals_of_branches)(reading(), self.batch)
        self.suspect |= not all(branch.finite for branch in signals)
        return signals

    def _of_the_step_before(self, span: int, number: int, filled: int, reading: Reading) -> Reading | None:
        """Exchange a reading for that of the step before; None if the slot was refilled since, or none was taken."""
        filled_then, earlier = self._earlier.get((span, number), (None, reading))
        self._earlier[span, number] = filled, reading
        return earlier if filled_then == filled else None

    def _tensor(self, step: int, span: int, what: Observed) -> Buffer:
        """Return what is observed, computed once a step; it holds until another is computed."""
        if self._observed is None or self._observed[:3] != (step, span, what):
            self._observed = step, span, what, self.space.spans.observed(span, what)
        return self._observed[3]


def signals_of_branches(
    rows: NDArray[np.generic], batch: int, motion: NDArray[np.generic] | None = None
) -> list[Signals]:
    """Sum up the signals part's rows, one `Signals` per guidance branch.

    A branch's offset is the RMS over its B images, its 95th percentile the largest of theirs, and the rest their mean.
    A row that is not finite makes the branch's value not finite.

    Args:
        rows: (R, 9), the conditional rows first.
        batch: B.
        motion: Of each row, (R,), where it was measured; a branch's is their mean.
    """
    values: list[list[float]] = rows.tolist()
    branches = [_branch_signals(values[first : first + batch]) for first in range(0, len(values), batch)]
    if motion is None:
        return branches
    means: list[float] = motion.reshape(-1, batch).mean(axis=1).tolist()
    return [replace(branch, motion=mean) for branch, mean in zip(branches, means, strict=True)]


def probes_of_branches(rows: NDArray[np.generic], batch: int) -> list[Signals]:
    """Return a probe's value per branch, the mean over its images: a `Signals` that says nothing else.

    A row that is not finite makes the branch's `paper_spatial` so, which any gate takes for a reason to evaluate.

    Args:
        rows: (R,), the conditional rows first.
        batch: B.
    """
    values: list[float] = rows.tolist()
    means = (math.fsum(values[first : first + batch]) / batch for first in range(0, len(values), batch))
    return [
        Signals(
            relative_offset=0.0,
            relative_offset_p95=0.0,
            spatial_change=0.0,
            paper_temporal=0.0,
            paper_spatial=0.0 if math.isfinite(mean) else math.nan,
            probe=mean,
        )
        for mean in means
    ]


def _branch_signals(rows: Sequence[Sequence[float]]) -> Signals:
    offset, p95, spatial, paper_temporal, paper_spatial, *means = zip(*rows, strict=True)
    count = len(rows)
    change_l1, reference_l1, change_square, reference_square = (sum(column) / count for column in means)
    return Signals(
        relative_offset=_root_mean_square(offset),
        relative_offset_p95=float(np.max(p95)),
        spatial_change=sum(spatial) / count,
        paper_temporal=sum(paper_temporal) / count,
        paper_spatial=sum(paper_spatial) / count,
        change_l1=change_l1,
        reference_l1=reference_l1,
        change_square=change_square,
        reference_square=reference_square,
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
