"""A small calibration with round numbers, for tests of what policies decide on it."""

from __future__ import annotations

from collections.abc import Sequence

from adacorr_deploy.caching.calibration import Calibration, CalibrationKey, Probe, caching_spans
from adacorr_deploy.caching.decisions import Span, SpanCache
from adacorr_deploy.caching.predictors import Predictor

STEPS = 12
PROBE_BLOCK = 1


def calibration(
    *, slope: float = 1.0, predictor: Predictor | None = None, spans: Sequence[Span] = (), blocks: int = 2
) -> Calibration:
    """Skipping k steps costs k² · 1e-4 wherever it starts; probe errors are 0.1; offsets 0.2 per step of age.

    Of a predictor of residuals it is for `spans`, or, without them, for all `blocks` as one.
    """
    predictor = predictor or Predictor()
    if predictor.kind.cache is SpanCache.RESIDUAL and not spans:
        spans = [Span(first=0, stop=blocks, cache=SpanCache.RESIDUAL)]
    return Calibration(
        key=CalibrationKey(
            checkpoint_sha256="0" * 64, sampler="ddim", steps=STEPS, guidance=4.0, latent_shape=(1, 4, 4)
        ),
        predictor=predictor,
        spans=caching_spans(spans),
        images=4,
        skip_costs=tuple(tuple(tuple(1e-4 * k * k for k in (1, 2, 3)) for _ in range(3)) for _ in range(STEPS)),
        probe=Probe(
            block=0 if predictor.whole_step else PROBE_BLOCK,
            expected=tuple(((0.1,) * 3,) * 3 for _ in range(STEPS)),
            slope=slope,
        ),
        offset_limits=tuple((0.2, 0.4, 0.6) for _ in range(STEPS)),
        paper_floors=tuple(2.0 + part % 2 for part in range(blocks)),
    )
