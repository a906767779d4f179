"""What calibration measures of skipping, as arrays that can be stored half-way, and the figures made of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adacorr_deploy.caching.calibration import MAX_MEASURE, MIN_COST
from adacorr_deploy.quality.array_files import Arrays

MAX_SKIPPED: Final = 6
MAX_GAP: Final = 6
FLOOR: Final = 1e-12  # squared error below float32's noise: the logarithms need a positive number


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipMeasurements:
    """Arrays of S steps, G gaps, K skipped steps, L block parts and B images; NaN where nothing was measured."""

    skip_errors: NDArray[np.float64]  # (S, G, K): squared, after the skip; infinite where it can't be
    gains: NDArray[np.float64]  # (S + 1,): the share of a squared error at a step that arrives at the end
    probe_errors: NDArray[np.float64]  # (S, G, K) by distance; 0 where nothing was measured
    probe_images: NDArray[np.float64]  # (S, B): the probe's, at the typical distance and gap
    skip_images: NDArray[np.float64]  # (S, B): skip errors, at the typical gap and number of steps
    offsets: NDArray[np.float64]  # (S, K): the largest √Ŝ by age
    paper_scores: NDArray[np.float64]  # (L, S)

    @classmethod
    def empty(cls, *, steps: int, blocks: int, batch: int) -> SkipMeasurements:
        gains = np.full(steps + 1, np.nan)
        gains[steps] = 1.0
        return cls(
            skip_errors=np.full((steps, MAX_GAP, MAX_SKIPPED), np.inf),
            gains=gains,
            probe_errors=np.zeros((steps, MAX_GAP, MAX_SKIPPED)),
            probe_images=np.full((steps, batch), np.nan),
            skip_images=np.full((steps, batch), np.nan),
            offsets=np.zeros((steps, MAX_SKIPPED)),
            paper_scores=np.full((blocks, steps), np.nan),
        )

    def arrays(self) -> Arrays:
        """Return everything by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> SkipMeasurements:
        """Return what `arrays` gave; shapes and types must be the same."""
        return cls(**{name: np.array(array, np.float64) for name, array in arrays.items()})

    def spread_gaps(self) -> None:
        """Take what was measured at the first gap for all: an estimate from one evaluation knows of no other."""
        for cube in (self.skip_errors, self.probe_errors):
            cube[:] = cube[:, :1]

    def costs(self, *, delay: int = 0) -> NDArray[np.float64]:
        """Return the costs of skipping, (S, G, K), which never fall with k: a step that undoes an error is chance.

        Args:
            delay: Steps after the skip that its errors were measured at.
        """
        costs = self.skip_errors * self._gain_after_skips(delay)
        costs[costs > MAX_MEASURE] = np.inf  # as good as can't be skipped
        rising: NDArray[np.float64] = np.maximum.accumulate(np.maximum(costs, MIN_COST), axis=-1)
        return rising

    def _gain_after_skips(self, delay: int) -> NDArray[np.float64]:
        """Return the gain at the step after each skip, (S, 1, K), interpolated in the logarithm."""
        measured = np.flatnonzero(~np.isnan(self.gains))
        after = np.arange(len(self.skip_errors))[:, None] + np.arange(1, MAX_SKIPPED + 1) + delay
        logs = np.interp(after, measured, np.log(self.gains[measured]))
        gains: NDArray[np.float64] = np.exp(logs)[:, None, :]
        return gains

    def slope(self) -> float:
        """Return the power of the probe's squared error, relative to the other images', that skip errors follow."""
        probes, skips = self.probe_images[:-1], self.skip_images[1:]  # of the evaluation before each skip
        known = ~np.isnan(probes).any(axis=1) & ~np.isnan(skips).any(axis=1)
        x, y = 2 * np.log(probes[known]), np.log(np.maximum(skips[known], FLOOR))
        x, y = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
        power = float((x * x).sum())
        return min(1.0, max(0.0, float((x * y).sum()) / power)) if power > 0 else 0.0


def geometric_mean(errors: NDArray[np.float64]) -> float:
    """The typical error: a few images stray a hundred times further than the rest, and would set an arithmetic mean.

    Where one has overflown, it is infinite: what was skipped there can't be skipped.
    """
    return math.exp(float(np.log(np.maximum(errors, FLOOR)).mean())) if np.isfinite(errors).all() else math.inf


def bounded(measures: ArrayLike) -> NDArray[np.float64]:
    """Return limits as a calibration may hold them: one that has overflown is 0, beyond which all is evaluated."""
    found = np.asarray(measures, np.float64)
    return np.where(found <= MAX_MEASURE, found, 0.0)
