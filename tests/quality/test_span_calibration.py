"""Calibrations of spans that keep residuals: they cost what runs through the ordinary loop do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adacorr_deploy.caching.calibration import CachingSpan, Calibration, calibration_from_json
from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.profile import AffineMap
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.quality.calibrate import CALIBRATION_SEED, CalibrationOptions, calibrate
from adacorr_deploy.runtime import Pipeline, SampleRequest
from tests.runtime.scripted import Script
from tests.runtime.tiny_dit import WIDTH

STEPS, IMAGES, GUIDANCE = 8, 2, 3.0
RTOL = 2e-3  # errors are small differences of float32 latents; the two sides add up in another order
RESIDUAL = Predictor(kind=PredictorKind.RESIDUAL)
PARTS = tuple(CachingSpan(first=part, stop=part + 1) for part in range(3))
WHOLE = (CachingSpan(first=0, stop=3),)


def calibrated(
    pipeline: Pipeline, predictor: Predictor, spans: tuple[CachingSpan, ...] = (), maps: tuple[AffineMap, ...] = ()
) -> Calibration:
    options = CalibrationOptions(
        steps=STEPS, guidance=GUIDANCE, images=IMAGES, predictor=predictor, spans=spans, maps=maps
    )
    return calibrate(pipeline, options)


def costs(calibration: Calibration) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.asarray(calibration.skip_costs)


@pytest.mark.parametrize("spans", [PARTS, WHOLE, (PARTS[0], CachingSpan(first=1, stop=3))])
def test_held_residuals_cost_the_same_however_all_parts_are_divided(
    pipeline: Pipeline, spans: tuple[CachingSpan, ...]
) -> None:
    """What a range adds is the sum of what its parts add: so does holding every part by its units and their gates."""
    held = calibrated(pipeline, Predictor(kind=PredictorKind.HOLD))
    np.testing.assert_allclose(costs(calibrated(pipeline, RESIDUAL, spans)), costs(held), rtol=RTOL)


@pytest.mark.parametrize("spans", [PARTS, WHOLE])
def test_extrapolated_residuals_cost_what_extrapolated_units_do(
    pipeline: Pipeline, spans: tuple[CachingSpan, ...]
) -> None:
    by_units = calibrated(pipeline, Predictor(kind=PredictorKind.TAYLOR))
    by_spans = calibrated(pipeline, Predictor(kind=PredictorKind.RESIDUAL_TAYLOR), spans)
    np.testing.assert_allclose(costs(by_spans), costs(by_units), rtol=0.02)


def test_parts_outside_the_spans_are_evaluated_in_skipped_steps_too(pipeline: Pipeline) -> None:
    skips_last = STEPS - 1

    def choose(step: int, block: int) -> Action:
        return Action.REUSE if step == skips_last and block == 1 else Action.EVALUATE

    request = SampleRequest((0, 1), steps=STEPS, guidance=GUIDANCE, seed=CALIBRATION_SEED)
    exact = pipeline.sample(request, Script(), history=1).latents
    strayed = pipeline.sample(request, Script(choose=choose, present_gates=False), history=1).latents
    expected = math.exp(np.log(np.square(strayed - exact).mean(axis=(1, 2, 3))).mean())
    found = calibrated(pipeline, RESIDUAL, (PARTS[1],))
    assert found.skip_costs[skips_last][0][0] == pytest.approx(expected, rel=RTOL)


def test_an_affine_map_that_changes_nothing_costs_what_holding_does_and_another_does_not(pipeline: Pipeline) -> None:
    affine = Predictor(kind=PredictorKind.AFFINE)
    same = AffineMap(first=0, stop=3, scale=(1.0,) * WIDTH, shift=(0.0,) * WIDTH)
    other = AffineMap(first=0, stop=3, scale=(1.5,) * WIDTH, shift=(0.1,) * WIDTH)
    held = costs(calibrated(pipeline, RESIDUAL, WHOLE))
    np.testing.assert_allclose(costs(calibrated(pipeline, affine, WHOLE, (same,))), held, rtol=RTOL)
    assert costs(calibrated(pipeline, affine, WHOLE, (other,)))[-1, 0, 0] > 1.5 * held[-1, 0, 0]


def test_the_probe_is_the_span_at_three_quarters_of_the_depth(pipeline: Pipeline) -> None:
    """Of single parts its errors are those of the same block held by its units."""
    held, by_parts = calibrated(pipeline, Predictor(kind=PredictorKind.HOLD)), calibrated(pipeline, RESIDUAL, PARTS)
    assert by_parts.probe.block == held.probe.block
    np.testing.assert_allclose(by_parts.probe.expected, held.probe.expected, rtol=1e-2)
    assert calibrated(pipeline, RESIDUAL, WHOLE).probe.block == 2


def test_calibrations_of_other_spans_have_other_names_and_read_back(pipeline: Pipeline) -> None:
    made = [calibrated(pipeline, RESIDUAL, spans) for spans in (PARTS, WHOLE, PARTS[1:], (PARTS[0], PARTS[2]))]
    assert len({each.file_name for each in made}) == len(made)
    for each in made:
        assert calibration_from_json(each.model_dump_json(), where="here") == each


def test_spans_that_do_not_fit_the_predictor_or_the_bundle_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(CalibrationError, match="predictor residual keeps what spans of block parts add"):
        calibrated(pipeline, RESIDUAL)
    with pytest.raises(CalibrationError, match="predictor hold keeps what spans"):
        calibrated(pipeline, Predictor(kind=PredictorKind.HOLD), WHOLE)
    with pytest.raises(CalibrationError, match="predictor residual keeps what spans"):
        calibrated(pipeline, RESIDUAL, (CachingSpan(first=0, stop=9),))
    with pytest.raises(CalibrationError, match="predictor affine needs the maps of a profile"):
        calibrated(pipeline, Predictor(kind=PredictorKind.AFFINE), WHOLE)
