"""What is measured of a run, step by step, for each quantity of a profile, and how it becomes the profile's field.

A collector sees every step once, with the steps before it as far back as its `reach`. What it measured of some images
are arrays whose last axis is the rows (of the affine maps: sums over rows), so that batches of images are measured one
after another, stored, and put together in the end. Everything is computed in NumPy: in float32, summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.profile import (
    POLYNOMIAL_DEGREE,
    AffineMap,
    ChangePolynomial,
    LinearGate,
    Quantity,
)

MAX_AGE: Final = 6  # steps that tables of errors look back
AFFINE_AGES: Final = 3  # ages that one affine map is fitted to: what policies with a map mostly reuse
_TINY: Final = 1e-12  # keeps a run that changes nothing from dividing by zero
_RIDGE: Final = 1.0  # of a gate's standardised weights: few images leave fewer samples than channels
_NEWTON_STEPS: Final = 25

Array = NDArray[np.float32]
Wide = NDArray[np.float64]
Measured = Mapping[str, NDArray[np.generic]]
Span = tuple[int, int]  # block parts first … stop − 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """What the buffers held in one evaluated step."""

    step: int
    boundaries: Sequence[Array]  # tokens before each block part and after the last, L + 1 of (R, N, D)
    units: Sequence[Array]  # per block part (U, R, N, D), results before their gates; empty if nobody asked for them
    modulated: Sequence[Array]  # per block part that somebody asks for (R, N, D): what its first unit computes on

    def residual(self, first: int, stop: int) -> Array:
        """Return what a span of block parts added to its input, (R, N, D)."""
        return self.boundaries[stop] - self.boundaries[first]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunShape:
    """The sizes of what is measured."""

    steps: int
    parts: int
    rows: int
    width: int
    spans: tuple[Span, ...]  # for affine maps
    kinds: tuple[str, ...] = ()  # of all units, in order through the parts


class Collector(Protocol):
    """Measures one quantity of one batch of images."""

    @property
    def reach(self) -> int:
        """How many steps before the present one it looks at."""
        ...

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        """Take a step and those before it, the newest first, no more than there were."""
        ...

    def measured(self) -> dict[str, NDArray[np.generic]]:
        """Return what was measured."""
        ...


def relative_l1(now: Array, before: Array, *, of_now: bool = False) -> Wide:
    """Return mean |x − x̄| ÷ mean |x̄| per row (or ÷ mean |x|, with `of_now`), (R,), of (R, N, D)."""
    change = np.abs(now - before).mean(axis=(1, 2), dtype=np.float64)
    size = np.abs(now if of_now else before).mean(axis=(1, 2), dtype=np.float64)
    return np.asarray(change / (size + _TINY))


class OutputChanges:
    """Pairs of the modulated input's and the output's relative L1 change from step to step."""

    reach = 1

    def __init__(self, shape: RunShape) -> None:
        self._pairs = np.zeros((2, shape.steps, shape.rows))

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        for before in earlier[:1]:
            self._pairs[0, now.step] = relative_l1(now.modulated[0], before.modulated[0])
            self._pairs[1, now.step] = relative_l1(now.boundaries[-1], before.boundaries[-1])

    def measured(self) -> dict[str, NDArray[np.generic]]:
        return {"pairs": self._pairs}


class Magnitudes:
    """Ratios of the whole residual's magnitude to that of the step before: the mean over tokens."""

    reach = 1

    def __init__(self, shape: RunShape) -> None:
        self._ratios = np.ones((shape.steps, shape.rows))

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        last = len(now.boundaries) - 1
        for before in earlier[:1]:
            norms = np.linalg.norm(now.residual(0, last), axis=2).astype(np.float64)
            norms_before = np.linalg.norm(before.residual(0, last), axis=2).astype(np.float64)
            self._ratios[now.step] = (norms / (norms_before + _TINY)).mean(axis=1)

    def measured(self) -> dict[str, NDArray[np.generic]]:
        return {"ratios": self._ratios}


class UnitChanges:
    """Errors of reusing the units' results by kind (a DiT's: attention, MLP) and age; means over the depth."""

    reach = MAX_AGE

    def __init__(self, shape: RunShape) -> None:
        self._kinds = shape.kinds
        self._errors = np.full((len({*shape.kinds}), shape.steps, MAX_AGE, shape.rows), np.inf)

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        for age, before in enumerate(earlier[:MAX_AGE], start=1):
            of_kinds: dict[str, list[Wide]] = {kind: [] for kind in self._kinds}
            pairs = (pair for parts in zip(now.units, before.units, strict=True) for pair in zip(*parts, strict=True))
            for kind, (unit, unit_before) in zip(self._kinds, pairs, strict=True):
                of_kinds[kind].append(relative_l1(unit, unit_before, of_now=True))
            self._errors[:, now.step, age - 1] = [np.mean(errors, axis=0) for errors in of_kinds.values()]

    def measured(self) -> dict[str, NDArray[np.generic]]:
        return {"errors": self._errors}


class PartChanges:
    """Errors of reusing what each block part adds, by age."""

    reach = MAX_AGE

    def __init__(self, shape: RunShape) -> None:
        self._errors = np.full((shape.parts, shape.steps, MAX_AGE, shape.rows), np.inf)

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        for part in range(len(self._errors)):
            fresh = now.residual(part, part + 1)
            for age, before in enumerate(earlier[:MAX_AGE], start=1):
                errors = relative_l1(fresh, before.residual(part, part + 1), of_now=True)
                self._errors[part, now.step, age - 1] = errors

    def measured(self) -> dict[str, NDArray[np.generic]]:
        return {"errors": self._errors}


class AffineSums:
    """Sums for least squares per channel of a span's residual on that of 1 … AFFINE_AGES steps before.

    Each pair weighs by the inverse of its squared difference: the last steps change a hundred times more than those
    that are reused, and a map fitted to all alike makes every other step worse than holding.
    """

    reach = AFFINE_AGES

    def __init__(self, shape: RunShape) -> None:
        self._spans = shape.spans
        self._sums = np.zeros((len(shape.spans), 5, shape.width))  # n, Σr̄, Σr, Σr̄², Σr̄·r

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        for sums, (first, stop) in zip(self._sums, self._spans, strict=True):
            fresh = now.residual(first, stop)
            for before in earlier[:AFFINE_AGES]:
                kept = before.residual(first, stop)
                weight = 1 / pair_spread(fresh, kept)
                sums[0] += weight * fresh.shape[0] * fresh.shape[1]
                for row, product in enumerate((kept, fresh, kept * kept, kept * fresh), start=1):
                    sums[row] += weight * product.sum(axis=(0, 1), dtype=np.float64)

    def measured(self) -> dict[str, NDArray[np.generic]]:
        return {"sums": self._sums}


def pair_spread(fresh: Array, kept: Array) -> float:
    """Return the mean square of a residual's change, and at least a millionth of what it is itself."""
    change = float(np.square(fresh - kept).mean(dtype=np.float64))
    return max(change, 1e-6 * float(np.square(kept).mean(dtype=np.float64)), _TINY)


class GateSamples:
    """A part's mean modulated input, and the error of reusing what it added one step before, relative to its output."""

    reach = 1

    def __init__(self, shape: RunShape) -> None:
        self._means = np.zeros((shape.parts, shape.steps, shape.width, shape.rows), np.float32)
        self._errors = np.full((shape.parts, shape.steps, shape.rows), np.nan)

    def see(self, now: StepView, earlier: Sequence[StepView]) -> None:
        for part in range(len(self._means)):
            self._means[part, now.step] = now.modulated[part].mean(axis=1).T
            for before in earlier[:1]:
                difference = now.residual(part, part + 1) - before.residual(part, part + 1)
                size = np.linalg.norm(now.boundaries[part + 1], axis=(1, 2))
                self._errors[part, now.step] = np.linalg.norm(difference, axis=(1, 2)) / (size + _TINY)

    def measured(self) -> dict[str, NDArray[np.generic]]:
        return {"means": self._means, "errors": self._errors}


COLLECTORS: Final[Mapping[Quantity, Callable[[RunShape], Collector]]] = {
    Quantity.OUTPUT_CHANGE: OutputChanges,
    Quantity.MAGNITUDE_RATIOS: Magnitudes,
    Quantity.UNIT_ERRORS: UnitChanges,
    Quantity.PART_ERRORS: PartChanges,
    Quantity.AFFINE: AffineSums,
    Quantity.GATES: GateSamples,
}


# --- From what was measured to a profile's field -----------------------------------------------------------------


def output_change(pairs: Wide) -> ChangePolynomial:
    """Fit the polynomial to all pairs of the steps after the first, (2, S, rows)."""
    inputs, outputs = pairs[:, 1:].reshape(2, -1)
    return polynomial_fit(inputs, outputs)


def polynomial_fit(x: Wide, y: Wide) -> ChangePolynomial:
    """Return the least-squares polynomial of degree 4; of fewer points, that of the smallest coefficients."""
    scale = float(x.max()) or 1.0  # powers of x near 1 keep the equations well conditioned
    powers = np.vander(x / scale, POLYNOMIAL_DEGREE + 1)
    solution = np.linalg.lstsq(powers, y, rcond=None)[0]
    coefficients = solution / scale ** np.arange(POLYNOMIAL_DEGREE, -1, -1)
    return ChangePolynomial(coefficients=tuple(coefficients.tolist()), low=float(x.min()), high=float(x.max()))


def magnitude_ratios(ratios: Wide) -> tuple[float, ...]:
    """Return the mean over rows of (S, rows)."""
    return tuple(shortened(ratios.mean(axis=-1)))


def unit_errors(errors: Wide, kinds: Sequence[str]) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Return the means over rows of (kinds, S, ages, rows), by kind in the order that they first come in."""
    of_kinds = zip(dict.fromkeys(kinds), errors.mean(axis=-1), strict=True)
    return {kind: _table(table) for kind, table in of_kinds}


def part_errors(errors: Wide) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Return the means over rows of (L, S, ages, rows)."""
    return tuple(_table(part) for part in errors.mean(axis=-1))


def affine_maps(sums: Wide, spans: Sequence[Span]) -> tuple[AffineMap, ...]:
    """Solve the least squares of each span; a channel that never varied is held: scale 1 and the mean difference."""
    maps = []
    for (count, kept, fresh, squares, products), (first, stop) in zip(sums, spans, strict=True):
        mean, mean_fresh = kept / count, fresh / count
        variance, covariance = squares / count - mean**2, products / count - mean * mean_fresh
        varies = variance > 1e-9 * np.maximum(squares / count, _TINY)
        scale = np.where(varies, covariance / np.where(varies, variance, 1.0), 1.0)
        shift = mean_fresh - scale * mean
        maps.append(AffineMap(first=first, stop=stop, scale=tuple(shortened(scale)), shift=tuple(shortened(shift))))
    return tuple(maps)


def linear_gates(means: NDArray[np.generic], errors: Wide) -> tuple[LinearGate, ...]:
    """Fit each part's gate: reuse is safe where its error is at most the median over all parts, steps and rows.

    Args:
        means: (L, S, D, rows).
        errors: (L, S, rows); NaN where nothing could be reused yet.
    """
    limit = float(np.nanmedian(errors))
    gates = []
    for part_means, part_errors_ in zip(means, errors, strict=True):
        known = ~np.isnan(part_errors_)
        samples = np.moveaxis(np.asarray(part_means, np.float64), 1, -1)[known]  # (samples, D)
        weights, bias = logistic_fit(samples, part_errors_[known] <= limit)
        gates.append(LinearGate(weights=tuple(shortened(weights)), bias=bias))
    return tuple(gates)


def logistic_fit(samples: Wide, safe: NDArray[np.bool_]) -> tuple[Wide, float]:
    """Return weights (D,) and bias of a ridge logistic regression, fitted by Newton's method on standardised features.

    Args:
        samples: (n, D).
        safe: (n,), what the logit is to be positive for.
    """
    center, spread = samples.mean(axis=0), samples.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    features = np.column_stack([(samples - center) / spread, np.ones(len(samples))])
    ridge = np.full(features.shape[1], _RIDGE)
    ridge[-1] = _TINY + 1e-3  # nearly free; a part whose samples are all safe has no finite bias without it
    solution = np.zeros(features.shape[1])
    for _ in range(_NEWTON_STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(features @ solution, -30.0, 30.0)))
        gradient = features.T @ (chance - safe) + ridge * solution
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        solution = solution - step
        if float(np.abs(step).max()) < 1e-8:
            break
    weights = solution[:-1] / spread
    return weights, float(solution[-1] - weights @ center)


def shortened(values: Wide) -> list[float]:
    """Return numbers with nine digits: more than was measured, and half of what a file would take otherwise."""
    return [float(f"{value:.9g}") for value in values.tolist()]


def _table(errors: Wide) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(shortened(row)) for row in errors)
