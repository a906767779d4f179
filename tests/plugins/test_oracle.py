"""The oracle itself, against numbers worked out by hand and the invariants of METHOD §1 to §3."""

from __future__ import annotations

import numpy as np
import pytest

from adacorr_deploy.plugins import oracle


@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (2, 1), (20, 2), (49, 3), (100, 6), (256, 13)])
def test_p95_is_the_nearest_rank(tokens: int, rank: int) -> None:
    assert oracle.p95_rank(tokens) == rank


def test_signals_of_a_case_worked_out_by_hand() -> None:
    reference = np.array([[[3.0, 4.0], [0.0, 2.0]]], np.float32)  # norms 5 and 2, deviations 0.5 and 1
    tokens = np.array([[[3.0, 5.0], [0.0, 4.0]]], np.float32)  # moved by 1 and 2, deviations 1 and 2
    expected = [np.sqrt((0.2**2 + 1.0**2) / 2), 1.0, 1.0, 1.5, 1.5]
    expected += [(1 + 2) / 4, (3 + 4 + 2) / 4, (1 + 4) / 4, (9 + 16 + 4) / 4]
    np.testing.assert_allclose(oracle.signals(tokens, reference)[0], expected, rtol=1e-5)


def test_prediction_worked_out_by_hand() -> None:
    """Two evaluations of one block, extrapolated with weights 2 and −1, the gates of step 1 and step 0."""
    modulation = np.zeros((2, 1, 6, 1), np.float32)
    modulation[:, 0, 2, 0] = [10.0, 1.0]  # gate of the attention at steps 0 and 1
    modulation[:, 0, 5, 0] = [20.0, 3.0]  # gate of the MLP
    history = np.array([5.0, 7.0, 11.0, 13.0], np.float32).reshape(2, 2, 1, 1, 1)
    result = oracle.predict(
        np.ones((1, 1, 1), np.float32), history, modulation, np.array([1, 0]), np.array([2.0, -1.0], np.float32)
    )
    assert result.item() == 1 + 2 * (1 * 5 + 3 * 7) - (10 * 11 + 20 * 13)


def test_combination_worked_out_by_hand() -> None:
    """Two residuals of one token of two channels, extrapolated with weights 2 and −1, then mapped per channel."""
    result = oracle.combine(
        np.array([[[1.0, 1.0]]], np.float32),
        np.array([5.0, 7.0, 11.0, 13.0], np.float32).reshape(2, 1, 1, 1, 2),
        np.array([2.0, -1.0], np.float32),
        scale=np.array([1.0, 10.0], np.float32),
        shift=np.array([0.0, 0.5], np.float32),
    )
    np.testing.assert_array_equal(result[0, 0], [1 + (10 - 11), 1 + 10 * (14 - 13) + 0.5])


def test_modulated_and_its_probe_worked_out_by_hand() -> None:
    """Tokens (1, 3) and (10, 20) are both (−1, 1) once normalised; shift and scale are rows 0 and 1 of step 1."""
    tokens = np.array([[[1.0, 3.0], [10.0, 20.0]]], np.float32)
    modulation = np.zeros((2, 1, 3, 2), np.float32)
    modulation[1, 0] = [[0.5, 0.25], [1.0, 3.0], [9.0, 9.0]]
    step = np.array([1])
    expected = [-1 * 2 + 0.5, 1 * 4 + 0.25]
    np.testing.assert_allclose(oracle.modulated(tokens, modulation, step)[0], [expected] * 2, rtol=1e-5)
    weights, bias = np.array([2.0, -1.0], np.float32), np.array([0.125], np.float32)
    np.testing.assert_allclose(
        oracle.probe(tokens, modulation, step, weights, bias), [2 * -1.5 - 4.25 + 0.125], rtol=1e-5
    )


def test_weight_is_a_ramp_between_the_thresholds_and_one_where_nothing_is_known() -> None:
    estimate = np.array([0.0, 0.1, 0.2, 0.3, 9.0, np.nan, np.inf, -np.inf], np.float32)
    weight = oracle.blend_weight(estimate, np.array([0.1, 0.3, 1.0], np.float32))
    np.testing.assert_allclose(weight, [0, 0, 0.5, 1, 1, 1, 1, 1], atol=1e-6)


def test_equal_thresholds_are_a_switch() -> None:
    estimate = np.array([0.1, 0.2, 0.3], np.float32)
    weight = oracle.blend_weight(estimate, np.array([0.2, 0.2, 1.0], np.float32))
    np.testing.assert_array_equal(weight, [0, 1, 1])


@pytest.mark.parametrize("count", [1, 4, 6, 785])
@pytest.mark.parametrize(("seed", "image"), [(0, 0), (7, 3), (2**64 - 1, 2**40)])
def test_noise_is_box_muller_of_numpy_s_own_philox_draw_after_draw(seed: int, image: int, count: int) -> None:
    size = -(-count // 4) * 4  # a draw takes whole counters
    raw = np.random.Philox(key=np.array([seed, image], np.uint64)).random_raw(3 * size).reshape(3, size)
    for draw, (first, second) in enumerate(zip(raw[:, 0::2], raw[:, 1::2], strict=True)):
        u, v = (((words >> np.uint64(11)).astype(np.float64) + 1) / 2**53 for words in (first, second))
        turns = np.exp(2j * np.pi * v) * np.sqrt(-2 * np.log(u))
        expected = np.stack([turns.real, turns.imag], axis=1).reshape(-1)[:count]
        found = oracle.philox_normals(seed, image, draw, count)
        assert found.shape == (count,) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_noise_is_standard_normal_and_images_and_draws_are_independent() -> None:
    sets = [oracle.philox_normals(*place, 4096) for place in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0))]
    moments = np.array([[np.mean(x), np.var(x) - 1, np.mean(x**3), np.mean(x**4) - 3] for x in sets])
    assert (np.abs(moments) < 5 * np.sqrt([1, 2, 15, 96]) / 64).all()
    correlations = np.corrcoef(sets) - np.eye(4)
    assert (np.abs(correlations) < 5 / 64).all()
