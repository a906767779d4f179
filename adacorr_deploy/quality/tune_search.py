"""Searching policies for a target, in numbers only: which knob meets it, which policies go on, what the front is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

EXPANSIONS: Final = 8  # times that a knob is moved by a factor before the search gives up on a bracket
HALVINGS: Final = 4  # of a bracket: to a sixteenth of its logarithm
_FACTOR: Final = 1.6


class Point(Protocol):
    """What a policy came to."""

    @property
    def speedup(self) -> float:
        """Of the uncached run, 1 or more."""
        ...

    @property
    def psnr_db(self) -> float:
        """Against the uncached images; infinite if none differs."""
        ...


PointT = TypeVar("PointT", bound=Point)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked for: a speed-up with as much quality as can be had, or the reverse. One of the two is None.

    Attributes:
        speedup: Least speed-up, above 1.
        psnr_db: Least mean PSNR against the uncached images, in dB.
    """

    speedup: float | None = None
    psnr_db: float | None = None

    def is_met(self, point: Point) -> bool:
        if self.speedup is not None:
            return point.speedup >= self.speedup
        return self.psnr_db is None or point.psnr_db >= self.psnr_db

    def merit(self, point: Point) -> float:
        """Return what is to be as large as can be among points that meet the target; infinite if no image differs."""
        return point.psnr_db if self.speedup is not None else point.speedup

    def is_too_fast(self, point: Point) -> bool:
        """Whether a slower setting is to be tried next: the one that meets the target best lies at the border."""
        return self.is_met(point) if self.speedup is not None else not self.is_met(point)

    def best(self, points: Sequence[PointT]) -> PointT | None:
        """Return the point of most merit that meets the target, or the one that comes nearest; None of none."""
        meeting = [point for point in points if self.is_met(point)]
        if meeting:
            return max(meeting, key=lambda point: (self.merit(point), point.speedup))
        return max(points, key=self.reached, default=None)

    def reached(self, point: Point) -> float:
        """Return how far a point gets: what was found ÷ what was asked."""
        if self.speedup is not None:
            return point.speedup / self.speedup
        return max(point.psnr_db, 0.0) / (self.psnr_db or 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """The one number of a policy that the search turns.

    Attributes:
        start: Where it begins, above 0.
        whole: Whether only whole numbers are allowed.
    """

    start: float
    whole: bool = False

    def moved(self, value: float, factor: float) -> float:
        """Return another value of the knob, as far away as `factor` says, and at least the next whole number."""
        if not self.whole:
            return value * factor
        return max(round(value * factor), value + 1) if factor > 1 else min(round(value * factor), value - 1)

    def between(self, one: float, other: float) -> float | None:
        """Return a value half-way in the logarithm; None if there is none between two whole numbers."""
        middle = math.sqrt(one * other)
        if not self.whole:
            return middle
        return next((value for value in (math.floor(middle), math.ceil(middle)) if value not in {one, other}), None)


def search(knob: Knob, measure: Callable[[float], PointT | None], target: Target) -> list[PointT]:
    """Turn a knob until its points stand on both sides of the target, then halve the bracket.

    Args:
        knob: Where to begin.
        measure: Returns the point of a value, None if the policy does not allow the value.
        target: What the points are compared with.

    Returns:
        Every point that was measured, none twice.
    """
    found: dict[float, PointT] = {}

    def at(value: float) -> PointT | None:
        if value not in found and value > 0 and (point := measure(value)) is not None:
            found[value] = point
        return found.get(value)

    first = at(knob.start)
    if first is None:
        return []
    bracket = _bracket(knob, at, target, first)
    for _ in range(HALVINGS):
        middle = knob.between(*bracket) if bracket is not None else None
        point = at(middle) if middle is not None else None
        if bracket is None or middle is None or point is None:
            break
        slow, fast = bracket
        bracket = (slow, middle) if target.is_too_fast(point) else (middle, fast)
    return list(found.values())


def _bracket(
    knob: Knob, at: Callable[[float], PointT | None], target: Target, first: PointT
) -> tuple[float, float] | None:
    """Return a value that is slow enough and one that is too fast; None if the knob's range holds no such two."""
    too_fast = target.is_too_fast(first)
    for factor in _directions(knob, at, first, faster=not too_fast):
        value = knob.start
        for _ in range(EXPANSIONS):
            before, value = value, knob.moved(value, factor)
            point = at(value)
            if point is None:
                break
            if target.is_too_fast(point) != too_fast:
                return (value, before) if too_fast else (before, value)
    return None


def _directions(knob: Knob, at: Callable[[float], PointT | None], first: PointT, *, faster: bool) -> tuple[float, ...]:
    """Return the factor that makes it faster (or slower), since knobs differ; both where measuring shows nothing."""
    up = at(knob.moved(knob.start, _FACTOR))
    down = at(knob.moved(knob.start, 1 / _FACTOR)) if up is None or up.speedup == first.speedup else None
    rise = (up.speedup - first.speedup) if up is not None else 0.0
    rise = rise or ((first.speedup - down.speedup) if down is not None else 0.0)
    if rise == 0.0:
        return (_FACTOR, 1 / _FACTOR)
    return (_FACTOR,) if (rise > 0) == faster else (1 / _FACTOR,)


def pareto_front(points: Sequence[PointT]) -> list[PointT]:
    """Return the points that no other beats in both speed and quality, fastest last; of equal ones the first."""
    front: list[PointT] = []
    for point in sorted(points, key=lambda point: (-point.speedup, -point.psnr_db)):
        if not front or point.psnr_db > front[-1].psnr_db:
            front.append(point)
    front.reverse()
    return front


def survivors(best: Sequence[tuple[str, Point]], target: Target, keep: int) -> list[str]:
    """Return the names of the `keep` families whose best point serves the target best (successive halving)."""

    def rank(entry: tuple[str, Point]) -> tuple[bool, float]:
        met = target.is_met(entry[1])
        return met, target.merit(entry[1]) if met else target.reached(entry[1])

    return [name for name, _ in sorted(best, key=rank, reverse=True)[:keep]]
