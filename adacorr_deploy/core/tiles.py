"""Where tiles lie on an image that is decoded piece by piece, and how their overlaps are blended."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def tile_starts(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Return where tiles begin along an axis: the fewest that cover it, spaced evenly.

    Args:
        length: Of the axis, ≥ `tile`.
        tile: Of each of them.
        overlap: What neighbours share at least, 0 … tile − 1 where there are neighbours.
    """
    if length == tile:
        return (0,)
    count = -(-(length - tile) // (tile - overlap)) + 1
    return tuple(round(index * (length - tile) / (count - 1)) for index in range(count))


def tile_weights(tile: int, overlap: int) -> NDArray[np.float32]:
    """Return how much a tile's pixels count along an axis, (tile,): they rise from its edges over the overlap.

    Where tiles overlap, the weighted mean of them goes over from one to the next; elsewhere a pixel has one tile, whose
    weight cancels out.
    """
    inward = np.arange(tile)
    from_edge = np.minimum(inward, inward[::-1]) + 1
    return np.minimum(1.0, from_edge / (overlap + 1)).astype(np.float32)
