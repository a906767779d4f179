"""A calibration file is untrusted, and holds for one key only."""

from __future__ import annotations

import json

import pytest

from adacorr_deploy.caching.calibration import calibration_for_run, calibration_from_json
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import CalibrationError
from tests.caching.scripted_calibration import calibration


def test_a_round_trip_through_json_changes_nothing() -> None:
    original = calibration()
    assert calibration_from_json(original.model_dump_json(), where="here") == original


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 9}, "schema_version"),
        ({"skip_costs": []}, "skip_costs has 0 steps"),
        ({"images": 0}, "images"),
        ({"surprise": 1}, "surprise"),
        ({"paper_floors": []}, "probe.block is 1"),
        ({"offset_limits": [[-1.0]] * 12}, "offset_limits"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, object], message: str) -> None:
    raw = {**json.loads(calibration().model_dump_json()), **change}
    with pytest.raises(CalibrationError, match=message):
        calibration_from_json(json.dumps(raw), where="here")


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(CalibrationError, match="here"):
        calibration_from_json("{", where="here")


@pytest.mark.parametrize("field", ["checkpoint_sha256", "sampler", "steps", "guidance", "latent_shape"])
def test_a_run_with_another_key_is_refused_with_the_difference(field: str) -> None:
    other = {"checkpoint_sha256": "1" * 64, "sampler": "ddpm", "steps": 30, "guidance": 1.5, "latent_shape": (1, 8, 8)}
    key = calibration().key.model_copy(update={field: other[field]})
    with pytest.raises(CalibrationError, match=field):
        calibration_for_run([calibration()], key, Predictor(), policy="robust")


def test_without_any_calibration_the_command_that_makes_one_is_given() -> None:
    with pytest.raises(CalibrationError, match="adacorr-calibrate BUNDLE --sampler ddim --steps 12 --guidance 4"):
        calibration_for_run([], calibration().key, None, policy="robust")


def test_the_matching_calibration_is_found() -> None:
    mine = calibration()
    assert calibration_for_run([mine], mine.key, Predictor(), policy="robust") is mine
    assert calibration_for_run([mine], mine.key, None, policy="paper-lazy") is mine


def test_a_calibration_of_another_predictor_is_refused_with_the_command_for_this_one() -> None:
    mine = calibration()
    other = Predictor(kind=PredictorKind.OUTPUT_TAYLOR)
    with pytest.raises(CalibrationError, match="--predictor output-taylor --order 1"):
        calibration_for_run([mine], mine.key, other, policy="robust")
