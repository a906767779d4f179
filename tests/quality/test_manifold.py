"""Precision and recall against the definition written out, and the properties that make them shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.quality.manifold import NEIGHBOURS, bootstrap_precision, inside_manifold


def clouds(seed: int, shift: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(40, 3)) + shift, generator.normal(size=(50, 3))


def by_definition(queries: NDArray[np.float64], points: NDArray[np.float64]) -> list[bool]:
    radii = [sorted(np.linalg.norm(points - point, axis=1))[NEIGHBOURS] for point in points]  # its own is the first
    return [
        any(np.linalg.norm(query - point) <= radius for point, radius in zip(points, radii, strict=True))
        for query in queries
    ]


@given(st.integers(0, 10_000), st.floats(0, 3))
def test_it_is_the_definition_of_the_paper(seed: int, shift: float) -> None:
    queries, points = clouds(seed, shift)
    assert inside_manifold(queries, points).tolist() == by_definition(queries, points)


def test_more_features_than_are_held_at_once_change_nothing() -> None:
    generator = np.random.default_rng(0)
    queries, points = generator.normal(size=(1100, 4)) + 1.5, generator.normal(size=(700, 4))
    some = inside_manifold(queries[:5], points)
    np.testing.assert_array_equal(inside_manifold(queries, points)[:5], some)
    assert 0 < inside_manifold(queries, points).mean() < 1


def test_a_set_lies_in_its_own_manifold_and_a_far_one_does_not() -> None:
    queries, points = clouds(1)
    assert inside_manifold(points, points).all()
    assert not inside_manifold(queries + 100, points).any()
    assert inside_manifold(points + 1e4, points + 1e4).all()  # far from the origin, where differences cancel


def test_the_interval_holds_the_share_and_narrows_with_more_samples() -> None:
    generator = np.random.default_rng(2)
    points = generator.normal(size=(300, 3))
    few, many = (bootstrap_precision(generator.normal(size=(n, 3)) * 1.5, points) for n in (50, 800))
    for interval in (few, many):
        assert 0 < interval.low < interval.value < interval.high <= 1.05
    assert many.high - many.low < few.high - few.low


def test_what_has_no_neighbours_or_no_common_width_is_refused() -> None:
    queries, points = clouds(3)
    with pytest.raises(RequestError, match="N above 3"):
        inside_manifold(queries, points[:3])
    with pytest.raises(RequestError, match="the same F"):
        inside_manifold(queries[:, :2], points)
    with pytest.raises(RequestError, match="NaN"):
        inside_manifold(np.full_like(queries, np.nan), points)
