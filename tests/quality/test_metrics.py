"""Metrics against hand-written oracles and the properties that make them distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.quality.metrics import (
    SSIM_SIGMA,
    SSIM_WINDOW,
    FeatureStatistics,
    Floats,
    bootstrap_frechet,
    bootstrap_frechet_ratio,
    feature_statistics,
    frechet_distance,
    max_abs,
    psnr_db,
    psnr_per_image,
    relative_l2,
    ssim_per_image,
)

SEEDS = st.integers(0, 2**32 - 1)


def random_images(seed: int, count: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, 28, 28)).astype(np.float32)


def random_features(seed: int, count: int, width: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) @ generator.normal(size=(width, width)) + generator.normal(size=width)


def gaussian(mean: list[float], covariance: list[list[float]]) -> FeatureStatistics:
    return FeatureStatistics(mean=np.array(mean), covariance=np.array(covariance), count=100)


def ssim(actual: Floats, expected: Floats) -> float:
    return float(ssim_per_image(actual, expected).mean())


def ssim_oracle(first: NDArray[np.float32], second: NDArray[np.float32], data_range: float) -> float:
    """Wang et al. 2004, equation 13, window by window."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    line = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for x_image, y_image in zip(first[:, 0].astype(float), second[:, 0].astype(float), strict=True):
        for row in range(28 - SSIM_WINDOW + 1):
            for column in range(28 - SSIM_WINDOW + 1):
                x = x_image[row : row + SSIM_WINDOW, column : column + SSIM_WINDOW]
                y = y_image[row : row + SSIM_WINDOW, column : column + SSIM_WINDOW]
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                values.append(likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return float(np.mean(values))


def test_equal_images_are_at_no_distance() -> None:
    images = random_images(0)
    assert max_abs(images, images) == 0.0
    assert relative_l2(images, images) == 0.0
    assert psnr_db(images, images) == math.inf
    assert ssim(images, images) == pytest.approx(1.0, abs=1e-12)


def test_relative_l2_and_max_abs_take_the_second_array_as_the_truth() -> None:
    expected = np.array([3.0, 4.0])
    assert relative_l2(expected * 1.5, expected) == pytest.approx(0.5)
    assert max_abs(np.array([3.0, 2.0]), expected) == 2.0
    assert relative_l2(expected, np.zeros(2)) == math.inf
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0.0


def test_nan_is_never_reported_as_equal() -> None:
    images = random_images(1)
    broken = images.copy()
    broken[1, 0, 3, 4] = np.nan
    values = (max_abs(broken, images), relative_l2(broken, images), psnr_db(broken, images), ssim(broken, images))
    assert all(math.isnan(value) for value in values), values


def test_psnr_of_a_constant_offset_is_analytic() -> None:
    zeros = np.zeros((1, 1, 28, 28), np.float32)
    assert psnr_db(zeros + 0.5, zeros) == pytest.approx(20 * math.log10(2.0 / 0.5))
    assert psnr_db(zeros + 0.5, zeros, data_range=1.0) == pytest.approx(20 * math.log10(1.0 / 0.5))


def test_psnr_averages_decibels_per_image_and_leaves_identical_ones_out() -> None:
    expected = np.zeros((3, 1, 28, 28))
    actual = expected + np.array([0.0, 0.2, 0.02]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(psnr_per_image(actual, expected), [np.inf, 20.0, 40.0])
    assert psnr_db(actual, expected) == pytest.approx(30.0)


@settings(max_examples=20, deadline=None)
@given(SEEDS, SEEDS)
def test_psnr_and_ssim_are_symmetric_and_ssim_stays_in_range(first: int, second: int) -> None:
    a, b = random_images(first), random_images(second)
    assert psnr_db(a, b) == pytest.approx(psnr_db(b, a))
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert -1.0 <= ssim(a, -a) <= ssim(a, a) <= 1.0 + 1e-12


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_ssim_equals_the_published_formula(share: float) -> None:
    a, b = random_images(2), random_images(3)
    mixed = (share * a + (1 - share) * b).astype(np.float32)
    assert ssim(a, mixed) == pytest.approx(ssim_oracle(a, mixed, 2.0), abs=1e-6)


def test_ssim_equals_torchmetrics_without_its_mirrored_border() -> None:
    torch = pytest.importorskip("torch")
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = random_images(2), random_images(3) * 0.5 + random_images(2) * 0.5
    x, y = (torch.from_numpy(images.astype(np.float64)) for images in (a, b))
    _, full = structural_similarity_index_measure(x, y, data_range=2.0, return_full_image=True)
    border = SSIM_WINDOW // 2
    assert ssim(a, b) == pytest.approx(float(full[..., border:-border, border:-border].mean()), abs=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    """In one dimension (μ₁ − μ₂)² + (σ₁ − σ₂)²; commuting covariances add up axis by axis."""
    assert frechet_distance(gaussian([1.0], [[4.0]]), gaussian([3.0], [[25.0]])) == pytest.approx(4.0 + 9.0)
    first, second = gaussian([0, 0], [[1, 0], [0, 16]]), gaussian([1, 2], [[9, 0], [0, 4]])
    assert frechet_distance(first, second) == pytest.approx(1 + 4 + (1 - 3) ** 2 + (4 - 2) ** 2)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 8), st.integers(2, 30), st.integers(2, 30))
def test_frechet_distance_is_a_distance(seed: int, width: int, count_a: int, count_b: int) -> None:
    """Also with fewer samples than features, when the covariance is singular."""
    a = feature_statistics(random_features(seed, count_a, width))
    b = feature_statistics(random_features(seed + 1, count_b, width))
    scale = np.trace(a.covariance) + np.trace(b.covariance)
    assert frechet_distance(a, a) <= 1e-6 * scale
    assert frechet_distance(a, b) >= 0.0
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-6 * scale)


def test_frechet_distance_equals_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    from torchmetrics.image.fid import _compute_fid

    a, b = (feature_statistics(random_features(seed, 200, 16)) for seed in (0, 1))
    expected = _compute_fid(*(torch.from_numpy(x) for x in (a.mean, a.covariance, b.mean, b.covariance)))
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_ignores_the_features_basis() -> None:
    features_a, features_b = random_features(4, 100, 6), random_features(5, 100, 6)
    rotation = np.linalg.qr(np.random.default_rng(6).normal(size=(6, 6)))[0]
    plain = frechet_distance(feature_statistics(features_a), feature_statistics(features_b))
    turned = frechet_distance(feature_statistics(features_a @ rotation), feature_statistics(features_b @ rotation))
    assert turned == pytest.approx(plain)


def test_statistics_are_those_of_numpy_in_float64() -> None:
    features = random_features(7, 50, 3).astype(np.float32)
    statistics = feature_statistics(features)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.astype(np.float64).T), rtol=1e-12)
    assert statistics.covariance.dtype == np.float64
    assert statistics.count == 50


def test_the_bootstrap_interval_holds_the_distance_and_shrinks_with_samples() -> None:
    features = np.random.default_rng(8).normal(size=(2000, 4))
    reference = feature_statistics(np.random.default_rng(9).normal(0.5, 1.0, size=(5000, 4)))
    few, many = bootstrap_frechet(features[:200], reference), bootstrap_frechet(features, reference)
    for interval in (few, many):
        assert interval.low <= interval.value <= interval.high
        assert interval.low <= 1.0 <= interval.high  # the true distance is 4 · 0.5²
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert bootstrap_frechet(features, reference) == many


def two_classes(seed: int, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features whose classes stand far apart, as real ones do, with equally many of each."""
    labels = np.arange(count) % 2
    return np.random.default_rng(seed).normal(size=(count, 3)) + 6.0 * labels[:, None], labels


def test_resampling_by_class_leaves_out_the_spread_that_a_fixed_mix_does_not_have() -> None:
    features, labels = two_classes(10, 600)
    reference = feature_statistics(two_classes(11, 20_000)[0])
    mixed = bootstrap_frechet(features, reference)
    by_class = bootstrap_frechet(features, reference, labels=labels)
    assert mixed.value == by_class.value
    assert by_class.high - by_class.low < 0.5 * (mixed.high - mixed.low)


def test_a_paired_ratio_sees_what_the_intervals_of_the_distances_cannot() -> None:
    baseline, labels = two_classes(12, 600)
    reference = feature_statistics(two_classes(13, 20_000)[0] + 0.5)
    worse = baseline - 0.02  # a little farther from the reference, for every image alike
    apart = bootstrap_frechet(worse, reference, labels=labels), bootstrap_frechet(baseline, reference, labels=labels)
    assert apart[0].low < apart[1].high, "the two intervals overlap"
    ratio = bootstrap_frechet_ratio(worse, baseline, reference, labels=labels)
    assert ratio.value == pytest.approx(apart[0].value / apart[1].value)
    assert 1.0 < ratio.low <= ratio.value <= ratio.high
    assert bootstrap_frechet_ratio(baseline, baseline, reference).high == 1.0


BAD_CALLS = {
    "shapes differ": (lambda: psnr_db(np.zeros((1, 4)), np.zeros((2, 4))), "can't be compared"),
    "empty": (lambda: max_abs(np.zeros(0), np.zeros(0)), "not empty"),
    "range": (lambda: psnr_db(np.zeros((1, 4)), np.zeros((1, 4)), data_range=0.0), "data_range is 0"),
    "ssim too small": (lambda: ssim(np.zeros((1, 1, 8, 8)), np.zeros((1, 1, 8, 8))), "at least 11"),
    "one vector": (lambda: feature_statistics(np.zeros((1, 3))), "N ≥ 2"),
    "nan features": (lambda: feature_statistics(np.full((3, 2), np.nan)), "NaN"),
    "widths": (lambda: frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], [[1, 0], [0, 1]])), "must be equal"),
    "negative": (lambda: frechet_distance(gaussian([0], [[-1]]), gaussian([0], [[1]])), "eigenvalue -1"),
    "mean and covariance": (lambda: gaussian([0, 1], [[1]]), "(F,) and (F, F)"),
    "confidence": (
        lambda: bootstrap_frechet(np.zeros((3, 1)), gaussian([0], [[1]]), confidence=1.0),
        "confidence 1.0",
    ),
    "resamples": (lambda: bootstrap_frechet(np.zeros((3, 1)), gaussian([0], [[1]]), resamples=1), "at least 2"),
    "labels": (
        lambda: bootstrap_frechet(np.zeros((3, 1)), gaussian([0], [[1]]), labels=np.zeros(2, np.int64)),
        "one label per vector",
    ),
    "no distance": (
        lambda: bootstrap_frechet_ratio(np.ones((3, 1)), np.zeros((3, 1)), gaussian([0], [[0]])),
        "nothing can be divided",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_refused_with_its_reason(case: str) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(RequestError) as caught:
        call()
    assert message in str(caught.value)
