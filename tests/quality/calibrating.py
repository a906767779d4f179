"""What tests of calibration ask for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.quality.calibrate import CalibrationOptions

STEPS, IMAGES, GUIDANCE = 12, 2, 3.0
PREDICTORS = (Predictor(), Predictor(kind=PredictorKind.OUTPUT_TAYLOR))
REVISED = Predictor(kind=PredictorKind.OUTPUT_TAYLOR, revision=Revision.QUADRATIC)

both_predictors = pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda predictor: predictor.label)
Calibrate = Callable[[Predictor], Calibration]


def options(predictor: Predictor = PREDICTORS[0]) -> CalibrationOptions:
    return CalibrationOptions(steps=STEPS, guidance=GUIDANCE, images=IMAGES, predictor=predictor)
