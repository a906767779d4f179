"""Batch buckets: into how many rows launches are cut, and the proof that a row's result doesn't depend on it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

MAX_BUCKET_ROWS: Final = 4096
_HOST_SHARE: Final = 0.05  # of the cheapest launch


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketTrial:
    """How one bucket did on a trial launch whose rows were all the same.

    Attributes:
        seconds: What the launch took.
        result: What every row came to, as bytes; None where the rows of the launch differ from one another.
    """

    seconds: float
    result: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """Sizes that launches come in, and how rows are dealt into them.

    Attributes:
        seconds: By rows of a launch, ascending: what one costs.
        identical: Whether a row's result was the same, bit for bit, in every one of them and at every place.
    """

    seconds: Mapping[int, float]
    identical: bool
    _deal: dict[int, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.seconds)

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def deal(self, rows: int) -> tuple[int, ...]:
        """Return the launches, largest first, that take so many rows in the least time: split or padded, as it pays.

        Args:
            rows: At least 1.
        """
        full, rest = divmod(rows, self.largest)
        if rest not in self._deal:
            self._deal[rest] = self._cheapest(rest)
        return (self.largest,) * full + self._deal[rest]

    def _cheapest(self, rows: int) -> tuple[int, ...]:
        best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # of 0, 1, … rows: time, and launches
        for left in range(1, rows + 1):
            after = ((size, best[max(left - size, 0)]) for size in self.sizes)
            best.append(min((self.seconds[size] + time, (size, *sizes)) for size, (time, sizes) in after))
        return tuple(sorted(best[rows][1], reverse=True))


def agreeing_buckets(trials: Mapping[int, BucketTrial]) -> Buckets:
    """Keep the buckets in which a row has one result: the largest such group, and of equal ones that of larger buckets.

    An engine may add in another order for another number of rows, so that results differ in the last bits. Then a
    request would depend on its neighbours. Where no bucket even agrees with itself, the largest is kept, and
    `identical` is False.
    """
    groups: dict[bytes, list[int]] = defaultdict(list)
    for rows, trial in trials.items():
        if trial.result is not None:
            groups[trial.result].append(rows)
    kept = max(groups.values(), key=lambda group: (len(group), max(group)), default=[max(trials)])
    return Buckets(seconds=_plausible({rows: trials[rows].seconds for rows in sorted(kept)}), identical=bool(groups))


def _plausible(measured: Mapping[int, float]) -> dict[int, float]:
    """Return what launches cost, from trials on a machine that may have been doing other things.

    Rows never cost more together than in smaller launches, and more rows never cost less: a trial that says so was
    disturbed. To each launch is added what the trial leaves out, the host's part.
    """
    host = _HOST_SHARE * min(measured.values())
    per_row = itertools.accumulate((seconds / rows for rows, seconds in measured.items()), min)
    seconds = (rows * cost for rows, cost in zip(measured, per_row, strict=True))
    return {rows: cost + host for rows, cost in zip(measured, itertools.accumulate(seconds, max), strict=True)}
