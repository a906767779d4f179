"""Tiles cover an image evenly, overlap by as much as was asked, and their weights go over into each other."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.core.tiles import tile_starts, tile_weights


@given(tile=st.integers(1, 64), more=st.integers(0, 300), share=st.floats(0, 0.99))
def test_tiles_cover_an_axis_and_overlap(tile: int, more: int, share: float) -> None:
    length, overlap = tile + more, int(tile * share)
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - tile
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 < step <= tile - overlap for step in steps)
    assert not steps or max(steps) - min(steps) <= 1
    assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) < more  # no tile too many


def test_of_an_axis_of_one_tile_the_overlap_says_nothing() -> None:
    assert tile_starts(8, 8, 16) == (0,)


@given(tile=st.integers(1, 64), share=st.floats(0, 0.5))
def test_weights_rise_from_the_edges_and_are_the_same_from_both_sides(tile: int, share: float) -> None:
    overlap = int(tile * share)
    weights = tile_weights(tile, overlap)
    np.testing.assert_array_equal(weights, weights[::-1])
    assert 0 < weights.min() <= weights.max() <= 1
    rising = weights[: overlap + 1][: (tile + 1) // 2]
    assert (np.diff(rising) >= 0).all()


def test_two_tiles_hand_over_linearly_in_their_overlap() -> None:
    left, right = tile_weights(8, 4)[-4:], tile_weights(8, 4)[:4]
    np.testing.assert_allclose(right / (left + right), [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
