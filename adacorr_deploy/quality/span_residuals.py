"""What spans of block parts added to their inputs at some evaluations, on the host: calibration of residual predictors.

The runtime keeps residuals in the engines' buffers; here they are read back and added in NumPy, in float32, so that any
evaluations can stand in a slot without having been run one after another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.calibration import CachingSpan
from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.caching.profile import AffineMap

Tokens = NDArray[np.generic]  # (R, N, D) in the model's precision


@dataclass(slots=True, kw_only=True)
class SpanResiduals:
    """The spans, and the evaluations that stand in their slots now.

    Attributes:
        maps: Of an affine predictor, one for each span.
    """

    predictor: Predictor
    spans: Sequence[CachingSpan]
    maps: Sequence[AffineMap] = ()
    _evaluations: Mapping[int, Sequence[Tokens]] = field(default_factory=dict)

    def fill(self, evaluations: Mapping[int, Sequence[Tokens]]) -> None:
        """Hold exactly these evaluations: of each step, one residual for each span."""
        self._evaluations = evaluations

    def starting_at(self, block: int) -> int | None:
        """Return the index of the span that starts at a block part, or None."""
        return next((index for index, span in enumerate(self.spans) if span.first == block), None)

    def ending_at(self, block: int) -> int | None:
        """Return the index of the span whose last block part this is, or None."""
        return next((index for index, span in enumerate(self.spans) if span.stop == block + 1), None)

    def estimate(self, index: int, step: int, tokens: Tokens) -> Tokens:
        """Return the span's estimated output at `step`, in the dtype of its input `tokens`."""
        steps = sorted(self._evaluations, reverse=True)
        coefficients = self.predictor.prediction(step, steps).coefficients
        added = np.zeros(tokens.shape, np.float32)
        for at, coefficient in zip(steps, coefficients, strict=False):
            added += np.float32(coefficient) * self._evaluations[at][index].astype(np.float32)
        if self.maps:
            scale, shift = (
                np.asarray(values, np.float32) for values in (self.maps[index].scale, self.maps[index].shift)
            )
            added = scale * added + shift
        return (tokens.astype(np.float32) + added).astype(tokens.dtype)
