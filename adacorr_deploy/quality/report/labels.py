"""Names beside the points of a chart, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LETTER: Final = 6.4  # pixels of a letter of the charts' 12-pixel font, on average
_HEIGHT: Final = 14.0
_AWAY: Final = 12.0  # from the point's middle
_RADIUS: Final = 6.0  # of a point


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Where a name starts or ends (`anchor` is SVG's text-anchor), and its base line."""

    x: float
    y: float
    anchor: str


def place_labels(
    points: Sequence[tuple[float, float]], names: Sequence[str], area: Box, *, covered: Sequence[Box] = ()
) -> list[Label | None]:
    """Return a place for each name, the first in line first; None where every place would cover something.

    Args:
        points: Middles of the points, in pixels.
        names: One for each; an empty one is left out.
        area: The chart: no name leaves it.
        covered: What else stands on it.
    """
    taken = [Box(left=x - _RADIUS, top=y - _RADIUS, right=x + _RADIUS, bottom=y + _RADIUS) for x, y in points]
    placed: list[Label | None] = []
    for index, ((x, y), name) in enumerate(zip(points, names, strict=True)):
        others = [*covered, *(box for other, box in enumerate(taken) if other != index)]
        found = next(
            (
                (label, box)
                for label, box in _candidates(x, y, len(name) * LETTER)
                if name and box.within(area) and not any(box.meets(other) for other in others)
            ),
            None,
        )
        placed.append(found[0] if found is not None else None)
        if found is not None:
            taken.append(found[1])
    return placed


def _candidates(x: float, y: float, width: float) -> list[tuple[Label, Box]]:
    """Return right, above, left and below, then the corners."""
    middle, above, below = y - _HEIGHT / 2, y - _AWAY - _HEIGHT, y + _AWAY
    right, left, centre = x + _AWAY, x - _AWAY - width, x - width / 2
    places = (
        (right, middle, "start", x + _AWAY),
        (centre, above, "middle", x),
        (left, middle, "end", x - _AWAY),
        (centre, below, "middle", x),
        (right, above + 5, "start", x + _AWAY),
        (left, above + 5, "end", x - _AWAY),
        (right, below - 5, "start", x + _AWAY),
        (left, below - 5, "end", x - _AWAY),
    )
    return [
        (
            Label(x=at, y=top + _HEIGHT * 0.78, anchor=anchor),
            Box(left=start, top=top, right=start + width, bottom=top + _HEIGHT),
        )
        for start, top, anchor, at in places
    ]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the places moved apart until neighbours are at least `gap` apart, in their order, within low … high."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    above = low - gap
    for index in order:
        above = moved[index] = max(moved[index], above + gap)
    below = high + gap
    for index in reversed(order):
        below = moved[index] = min(moved[index], below - gap)
    return moved
