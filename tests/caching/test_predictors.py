"""Predictors: the coefficients of the polynomial through the evaluations, on whichever gates the kind says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.caching.polynomials import polynomial_coefficients
from adacorr_deploy.caching.predictors import Predictor, PredictorKind

evaluations = st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(lambda s: sorted(s, reverse=True))


@given(
    evaluations=evaluations, ahead=st.integers(1, 6), polynomial=st.lists(st.integers(-5, 5), min_size=3, max_size=3)
)
def test_a_polynomial_of_the_order_is_predicted_exactly(
    evaluations: list[int], ahead: int, polynomial: list[int]
) -> None:
    step = evaluations[0] + ahead
    powers = polynomial[: len(evaluations)]

    def value(at: int) -> float:
        return sum(factor * at**power for power, factor in enumerate(powers))

    coefficients = polynomial_coefficients(step, evaluations)
    predicted = sum(c * value(e) for c, e in zip(coefficients, evaluations, strict=True))
    assert predicted == pytest.approx(value(step), rel=1e-9, abs=1e-6)
    assert sum(coefficients) == pytest.approx(1.0, abs=1e-6)


def test_hold_repeats_the_last_residual_with_its_own_gates() -> None:
    prediction = Predictor(kind=PredictorKind.HOLD).prediction(9, [7, 5, 4])
    assert (prediction.coefficients, prediction.gate_steps) == ((1.0,), (7,))


def test_gated_applies_the_gates_of_the_present_step() -> None:
    prediction = Predictor(kind=PredictorKind.GATED).prediction(9, [7, 5])
    assert (prediction.coefficients, prediction.gate_steps) == ((1.0,), (9,))


def test_gated_taylor_extrapolates_by_the_ratio_of_distances() -> None:
    prediction = Predictor().prediction(9, [7, 4])
    assert prediction.coefficients == pytest.approx((1 + 2 / 3, -2 / 3))
    assert prediction.gate_steps == (9, 9)


def test_the_order_falls_to_what_the_history_allows() -> None:
    assert Predictor(order=2).prediction(3, [2]).coefficients == (1.0,)
    assert len(Predictor(order=2).prediction(3, [2, 1]).coefficients) == 2


@pytest.mark.parametrize(
    ("kind", "order", "history"), [("hold", 1, 1), ("gated", 2, 1), ("taylor", 1, 2), ("gated-taylor", 2, 3)]
)
def test_a_slot_keeps_no_more_than_the_predictor_reads(kind: str, order: int, history: int) -> None:
    assert Predictor(kind=PredictorKind(kind), order=order).history == history
