"""From numbers to places on a chart: scales, and ticks that a person would have chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A linear or logarithmic axis: `low` … `high` in the data lie at `start` … `stop` in pixels."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value, in pixels; values beyond the ends stay at the ends."""
        low, high, at = (math.log10(number) if self.logarithmic else number for number in (self.low, self.high, value))
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.stop - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Return about so many round numbers within the axis; of a long logarithmic one, the powers of ten."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low) - 1e-9), math.ceil(math.log10(self.high)) + 1)
            within = (1 - 1e-9) * self.low, (1 + 1e-9) * self.high
            for digits in ((1, 2, 5), (1, 3), (1,)):
                ticks = [digit * 10.0**power for power in powers for digit in digits]
                inside = [tick for tick in ticks if within[0] <= tick <= within[1]]
                if len(inside) <= wanted + 2:
                    break
            return inside
        step = _round_step((self.high - self.low) / max(wanted, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def scale_for(
    values: Sequence[float], start: float, stop: float, *, margin: float = 0.08, logarithmic: bool = False
) -> Scale:
    """Return a scale on which all values have some air around them.

    Args:
        values: Finite; positive for a logarithmic scale. None at all gives an axis from 0 to 1.
        start: Place of the low end, in pixels.
        stop: Place of the high end.
        margin: Share of the range that is added at both ends.
        logarithmic: Of powers of ten.
    """
    if not values:
        return Scale(low=0.1 if logarithmic else 0.0, high=1.0, start=start, stop=stop, logarithmic=logarithmic)
    low, high = min(values), max(values)
    if logarithmic:
        low, high = _round_below(low), 1 / _round_below(1 / high)
        return Scale(low=low, high=high if high > low else low * 10, start=start, stop=stop, logarithmic=True)
    apart = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else 0.0  # else rounding is all they differ by
    air = apart * margin or abs(high) * 0.1 or 1.0
    return Scale(low=low - air, high=high + air, start=start, stop=stop)


def _round_below(number: float) -> float:
    """Return the largest 1, 2 or 5 times a power of ten that is not above the number."""
    power = 10.0 ** math.floor(math.log10(number))
    return max(digit * power for digit in (0.5, 1.0, 2.0, 5.0) if digit * power <= number)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in _STEPS if step * power >= rough * (1 - 1e-9))
