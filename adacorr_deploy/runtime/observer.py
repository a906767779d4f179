"""What a controller has watched of each span: measured against an earlier one, kept, and summed up per branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Controller, Kept, Observation, Observed, Signals, SlotHistory
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.runtime.workspace import Reading, Workspace


@dataclass(slots=True, kw_only=True)
class Observer:
    """The observations of one request."""

    space: Workspace
    controller: Controller
    batch: int
    suspect: bool = False  # something that was measured was not finite; whoever looks into it resets it
    _observed: tuple[int, int, Buffer] | None = None  # step and span of the last one that was computed
    _earlier: dict[int, tuple[int, Reading]] = field(default_factory=dict)  # span → when it was filled, last signals

    def signals(self, step: int, span: int, history: SlotHistory) -> list[Signals] | None:
        """Return a span's signals, one per guidance branch, if the controller asks for them and there are any."""
        if not history.steps or not self.controller.needs_signals(step, span, history):
            return None
        observation = self.controller.observation(span)
        if observation is None:
            return None
        reading: Reading | None = self._measured(step, span, observation)
        if self.controller.lags:
            reading = self._of_the_step_before(span, history.steps[0], reading)
        if reading is None:
            return None
        rows = reading()
        probes = observation.what is Observed.PROBE
        signals = probes_of_branches(rows, self.batch) if probes else signals_of_branches(rows, self.batch)
        self.suspect |= not all(branch.finite for branch in signals)
        return signals

    def keep(self, step: int, span: int, kept: Kept) -> None:
        """Keep what is observed of a span now, if that is what it will be compared with."""
        observation, reference = self.controller.observation(span), self.space.slots.spans[span].reference
        if observation is None or reference is None or observation.kept is not kept:
            return
        reference.copy_from(self._tensor(step, span, observation))
        self._observed = None

    def _measured(self, step: int, span: int, observation: Observation) -> Reading:
        if observation.what is Observed.PROBE:
            return self.space.spans.probe(span)
        slot = self.space.slots.spans[span]
        use = "observed", span, observation.what.value  # another request of this size may observe something else
        return self.space.compare(use, self._tensor(step, span, observation), slot.kept_reference)

    def _of_the_step_before(self, span: int, filled: int, reading: Reading | None) -> Reading | None:
        """Exchange a reading for that of the step before; None if the slot was refilled since, or none was taken."""
        if reading is None:
            return None
        filled_then, earlier = self._earlier.get(span, (None, reading))
        self._earlier[span] = filled, reading
        return earlier if filled_then == filled else None

    def _tensor(self, step: int, span: int, observation: Observation) -> Buffer:
        """Return what is observed, computed once a step."""
        if self._observed is None or self._observed[:2] != (step, span):
            self._observed = step, span, self.space.spans.observed(span, observation.what)
        return self._observed[2]


def signals_of_branches(rows: NDArray[np.generic], batch: int) -> list[Signals]:
    """Sum up the signals part's rows, one `Signals` per guidance branch.

    A branch's offset is the RMS over its B images, its 95th percentile the largest of theirs, and the rest their mean.
    A row that is not finite makes the branch's value not finite.

    Args:
        rows: (R, 9), the conditional rows first.
        batch: B.
    """
    values: list[list[float]] = rows.tolist()
    return [_branch_signals(values[first : first + batch]) for first in range(0, len(values), batch)]


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
