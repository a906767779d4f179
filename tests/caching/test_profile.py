"""A profile file is let through only if policies can reckon with every number in it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from adacorr_deploy.caching.calibration import CalibrationKey
from adacorr_deploy.caching.profile import (
    AffineMap,
    ChangePolynomial,
    LinearGate,
    Profile,
    Quantity,
    check_profile,
    profile_for_run,
    profile_from_json,
)
from adacorr_deploy.core.errors import CalibrationError
from tests.runtime.tiny_dit import tiny_spec

STEPS = 4
KEY = CalibrationKey(checkpoint_sha256="0" * 64, sampler="ddim", steps=STEPS, guidance=4.0, latent_shape=(1, 4, 4))
TABLE = tuple((0.1 * step, float("inf")) for step in range(STEPS))
FULL = Profile(
    key=KEY,
    images=2,
    output_change=ChangePolynomial(coefficients=(0.0, 0.0, 1.0, 1.0, 0.0), low=0.1, high=0.5),
    magnitude_ratios=(1.0, 1.1, 0.9, 1.2),
    unit_errors={"attention": TABLE, "mlp": TABLE},
    part_errors=(TABLE,) * 3,
    affine=(AffineMap(first=0, stop=3, scale=(1.0,) * 4, shift=(0.0,) * 4),),
    gates=(LinearGate(weights=(0.5,) * 4, bias=-1.0),) * 3,
)


def changed(**fields: object) -> str:
    return json.dumps({**json.loads(FULL.model_dump_json()), **fields})


def test_it_is_read_back_as_it_was_written_and_fits_its_model() -> None:
    assert profile_from_json(FULL.model_dump_json(), where="here") == FULL
    assert FULL.quantities == frozenset(Quantity)
    check_profile(FULL, tiny_spec(), where="here")
    check_profile(Profile(key=KEY, images=1), tiny_spec(), where="here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magnitude_ratios": [1.0]}, "magnitude_ratios holds 1 numbers, allowed are the key's 4"),
        ({"magnitude_ratios": [1.0, 1.0, 1.0, "NaN"]}, "magnitude_ratios.3"),
        ({"magnitude_ratios": [1.0, 1.0, 1.0, -1.0]}, "magnitude_ratios.3"),
        ({"unit_errors": {"attention": [[0.1]], "mlp": [[0.1]] * 4}}, "unit_errors.attention has 1 steps"),
        ({"part_errors": [[[0.1], [0.1], [0.1, 0.2], [0.1]]]}, "part_errors.0 has rows of 2 and of 1 ages"),
        ({"part_errors": [[[-0.1]] * 4]}, "part_errors.0.0.0: allowed are 0"),
        ({"part_errors": []}, "part_errors"),
        ({"output_change": {"coefficients": [1.0], "low": 0, "high": 1}}, "output_change.coefficients"),
        ({"output_change": {"coefficients": [0] * 5, "low": 1, "high": 0.5}}, "low is 1, allowed is at most high"),
        ({"affine": [{"first": 1, "stop": 1, "scale": [1], "shift": [0]}]}, "stop is 1, allowed is more than first"),
        ({"affine": [{"first": 0, "stop": 1, "scale": [1], "shift": [0, 0]}]}, "shift holds 2 numbers"),
        ({"gates": [{"weights": [1e13], "bias": 0}]}, "gates.0.weights.0"),
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_what_no_profile_can_hold_is_refused_with_its_place(fields: Mapping[str, object], message: str) -> None:
    with pytest.raises(CalibrationError) as refused:
        profile_from_json(changed(**fields), where="here/profile.json", bundle="my.bundle")
    assert message in str(refused.value)
    assert str(refused.value).startswith("here/profile.json: ")
    assert "adacorr-calibrate my.bundle --sampler ddim --steps 4 --guidance 4 --policies NAMES" in str(refused.value)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (
            FULL.model_copy(update={"part_errors": (TABLE,) * 2}),
            "part_errors holds 2 entries, allowed are the",
        ),
        (FULL.model_copy(update={"gates": FULL.gates[:1]}), "gates holds 1 entries"),  # type: ignore[index]
        (
            FULL.model_copy(update={"gates": (LinearGate(weights=(1.0,), bias=0.0),) * 3}),
            "gates.0.weights holds 1 entries, allowed are the model's 4",
        ),
        (
            FULL.model_copy(update={"affine": (AffineMap(first=0, stop=9, scale=(1.0,) * 4, shift=(0.0,) * 4),)}),
            "affine.0.stop is 9, allowed are 1 … 3",
        ),
    ],
)
def test_another_models_profile_is_refused(profile: Profile, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check_profile(profile, tiny_spec(), where="here")


def test_the_profile_of_the_runs_key_is_found() -> None:
    other = FULL.model_copy(update={"key": KEY.model_copy(update={"steps": 30})})
    assert profile_for_run([other, FULL], KEY, [Quantity.GATES], policy="lazydit") is FULL


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ([], "the bundle holds none"),
        ([FULL.model_copy(update={"gates": None})], "the bundle's has no gates"),
        (
            [FULL.model_copy(update={"key": KEY.model_copy(update={"guidance": 2.0})})],
            "the bundle's is for another run (guidance is 2.0, the run's is 4.0)",
        ),
    ],
)
def test_a_missing_quantity_is_refused_with_the_command_that_measures_it(profiles: list[Profile], message: str) -> None:
    with pytest.raises(CalibrationError) as refused:
        profile_for_run(profiles, KEY, [Quantity.GATES], policy="lazydit", bundle="my.bundle")
    assert message in str(refused.value)
    command = "adacorr-calibrate my.bundle --sampler ddim --steps 4 --guidance 4 --policies lazydit"
    assert str(refused.value).endswith(f"Measure it with: {command}")
    with pytest.raises(CalibrationError, match=r"policy mine needs .* --policies FILE$"):
        profile_for_run(profiles, KEY, [Quantity.GATES], policy="mine")


def test_a_polynomial_never_promises_less_than_no_change() -> None:
    falling = ChangePolynomial(coefficients=(0.0, 0.0, 0.0, 1.0, -0.3), low=0.1, high=0.5)
    assert falling.at(0.2) == 0.0
    assert falling.at(0.4) == pytest.approx(0.1)
