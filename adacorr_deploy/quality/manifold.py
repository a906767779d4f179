"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991): how much two sets of features overlap.

The manifold of a set is the union of balls around its features, each reaching to the feature's k-th nearest neighbour
in the set. Precision is the share of the samples inside the manifold of the reference, recall the share of the
reference inside that of the samples. torch-fidelity holds both too, behind its own feature extractor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.quality.metrics import BootstrapInterval, Floats, bootstrap_mean

NEIGHBOURS: Final = 3  # the paper's k
_ROWS: Final = 512  # bounds the distances held at once to 512 × N numbers


def inside_manifold(queries: Floats, points: Floats, *, neighbours: int = NEIGHBOURS) -> NDArray[np.bool_]:
    """Return which queries lie in the manifold of `points`: (M, F) and (N, F) → (M,).

    A feature is not its own neighbour. Distances are Euclidean, in float64.

    Raises:
        RequestError: If there are no more points than neighbours, the widths differ, or a value is not finite.
    """
    _check(queries, points, neighbours)
    wide, asked = np.asarray(points, np.float64), np.asarray(queries, np.float64)
    radii = np.concatenate(
        [np.partition(rows, neighbours, axis=1)[:, neighbours] for rows in _squared_distances(wide, wide)]
    )  # of the sorted distances, the first is a feature's own
    return np.concatenate([(rows <= radii).any(axis=1) for rows in _squared_distances(asked, wide)])


def bootstrap_precision(
    samples: Floats, reference: Floats, *, labels: NDArray[np.int64] | None = None, seed: int = 0
) -> BootstrapInterval:
    """Return the share of `samples` inside the manifold of `reference`, with its 95 % bootstrap interval.

    Recall is the same with both exchanged. Resampled are the samples that are asked about, and not the manifold: a
    feature that is drawn twice would be its own neighbour and shrink it.

    Args:
        samples: (M, F).
        reference: (N, F), N > 3.
        labels: (M,) classes of the samples; given, each class is resampled by itself.
        seed: Of the resampling.

    Raises:
        RequestError: As `inside_manifold`.
    """
    inside = inside_manifold(samples, reference)
    return bootstrap_mean(inside.astype(np.float64), labels=labels, seed=seed)


def _squared_distances(rows: NDArray[np.float64], points: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield the squared distances of some rows at a time to all points, as ‖r‖² + ‖p‖² − 2·r·p.

    Taken from the points' mean, so that little cancels: what rounding leaves is far below any radius.
    """
    middle = points.mean(axis=0)
    centred = points - middle
    squares = np.square(centred).sum(axis=1)
    for first in range(0, len(rows), _ROWS):
        some = rows[first : first + _ROWS] - middle
        yield np.maximum(np.square(some).sum(axis=1)[:, None] + squares - 2 * (some @ centred.T), 0.0)


def _check(queries: Floats, points: Floats, neighbours: int) -> None:
    if points.ndim != 2 or queries.ndim != 2 or queries.shape[1] != points.shape[1] or len(points) <= neighbours:
        raise RequestError(
            f"Precision and recall of features of shape {queries.shape} and {points.shape}: both must be (N, F) with "
            f"the same F, and N above {neighbours}. Sample more images, and use one network for both sets."
        )
    if not (np.isfinite(queries).all() and np.isfinite(points).all()):
        raise RequestError("Precision and recall got features with NaN or infinity. Look at the network's output.")
