"""How far images are from others: NumPy in, plain numbers out.

Pairs of images: PSNR, SSIM, relative L2, largest difference, distance of features. Sets of images: the Fréchet distance
of their features (precision and recall: `manifold`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError

Floats = NDArray[np.float32] | NDArray[np.float64]

SSIM_SIGMA: Final = 1.5
SSIM_WINDOW: Final = 11  # 28×28 images have 18×18 whole windows; only those are averaged
_RANGE: Final = 2.0  # images in [−1, 1]
_NEGATIVE_TOLERANCE: Final = 1e-8  # relative: smaller negative eigenvalues of a covariance are rounding


def max_abs(actual: Floats, expected: Floats) -> float:
    """Return the largest absolute difference, in the arrays' unit; NaN if there is any NaN.

    Raises:
        RequestError: If the shapes differ or the arrays are empty.
    """
    _check_same_shape(actual, expected)
    return float(np.abs(_difference(actual, expected)).max())


def relative_l2(actual: Floats, expected: Floats) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ over all elements: 0 if equal, infinity if only `expected` is all zeros.

    Raises:
        RequestError: If the shapes differ or the arrays are empty.
    """
    _check_same_shape(actual, expected)
    error = float(np.linalg.norm(_difference(actual, expected)))
    scale = float(np.linalg.norm(np.asarray(expected, np.float64)))
    if error == 0.0:
        return 0.0
    return error / scale if scale else math.inf


def psnr_per_image(actual: Floats, expected: Floats, *, data_range: float = _RANGE) -> NDArray[np.float64]:
    """Return each image's 10·log₁₀(range² / MSE) in dB: (N, …) → (N,); identical images give infinity.

    Args:
        actual: Images, (N, …), float32 or float64.
        expected: The images they should equal; same shape.
        data_range: Largest minus smallest possible value: 2 for [−1, 1].

    Raises:
        RequestError: If the shapes differ, the arrays are empty or `data_range` is not positive.
    """
    _check_same_shape(actual, expected)
    _check_range(data_range)
    squares = _difference(actual, expected).reshape(len(actual), -1) ** 2
    with np.errstate(divide="ignore"):
        ratios: NDArray[np.float64] = 10.0 * np.log10(data_range**2 / squares.mean(axis=1))
    return ratios


def psnr_db(actual: Floats, expected: Floats, *, data_range: float = _RANGE) -> float:
    """Return the mean over images of their PSNR in dB: infinity if all are identical.

    Images that are identical have no finite PSNR and are left out of the mean when others differ: the mean then says
    how far the changed images are. Arguments and errors as `psnr_per_image`.
    """
    ratios = psnr_per_image(actual, expected, data_range=data_range)
    differing = ratios[ratios != math.inf]
    return float(differing.mean()) if differing.size else math.inf


def ssim_per_image(actual: Floats, expected: Floats, *, data_range: float = _RANGE) -> NDArray[np.float64]:
    """Return each image's mean structural similarity, in [−1, 1]: (N, C, H, W) → (N,); 1 for equal images.

    As published (Wang et al. 2004): Gaussian window of 11×11 with σ = 1.5, k₁ = 0.01, k₂ = 0.03, in float64, over the
    windows that lie wholly inside the image: 18×18 of them in a 28×28 image. (torchmetrics adds windows that look at a
    mirrored border; cropped by 5 pixels, its map is this one.)

    Args:
        actual: Images, (N, C, H, W), H and W at least 11.
        expected: The images they should equal; same shape.
        data_range: Largest minus smallest possible value: 2 for [−1, 1].

    Raises:
        RequestError: If the shapes differ or are too small, or `data_range` is not positive.
    """
    _check_same_shape(actual, expected)
    _check_range(data_range)
    if actual.ndim != 4 or min(actual.shape[2:]) < SSIM_WINDOW:
        raise RequestError(
            f"SSIM got images of shape {actual.shape}; it takes (N, C, H, W) with sides of at least {SSIM_WINDOW}. "
            "Compare smaller arrays with relative_l2."
        )
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    variances = _window_mean(x * x) - mean_x**2 + _window_mean(y * y) - mean_y**2
    covariance = _window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity: NDArray[np.float64] = likeness / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    means: NDArray[np.float64] = similarity.mean(axis=(1, 2, 3))
    return means


def _window_mean(images: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian-weighted mean of every whole window: (N, C, H, W) → (N, C, H − 10, W − 10)."""
    weights = np.exp(-0.5 * ((np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / SSIM_SIGMA) ** 2)
    weights /= weights.sum()
    height, width = (side - SSIM_WINDOW + 1 for side in images.shape[2:])
    rows = np.zeros((*images.shape[:2], height, images.shape[3]))
    for offset, weight in enumerate(weights):
        rows += weight * images[:, :, offset : offset + height]
    mean = np.zeros((*images.shape[:2], height, width))
    for offset, weight in enumerate(weights):
        mean += weight * rows[..., offset : offset + width]
    return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStatistics:
    """Mean (F,) and unbiased covariance (F, F), float64, of `count` feature vectors."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (self.mean.size, self.mean.size):
            raise RequestError(
                f"Feature statistics got mean {self.mean.shape} and covariance {self.covariance.shape}; "
                "they take (F,) and (F, F). Make them with feature_statistics(features)."
            )
        if self.count < 2 or not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise RequestError(
                f"Feature statistics of {self.count} vectors are not usable; they need at least 2 finite vectors. "
                "Sample more images, or look for NaN in them."
            )


def feature_statistics(features: Floats) -> FeatureStatistics:
    """Return the statistics of feature vectors (N, F), N ≥ 2.

    Raises:
        RequestError: If there are fewer than two vectors or any is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise RequestError(f"Features of shape {features.shape}: (N, F) with N ≥ 2 is needed. Sample more images.")
    wide = np.asarray(features, np.float64)
    covariance = np.atleast_2d(np.cov(wide, rowvar=False))
    return FeatureStatistics(mean=wide.mean(axis=0), covariance=covariance, count=len(wide))


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½), ≥ 0, as the FID is defined (squared, in float64).

    Tr (Σ₁Σ₂)^½ is taken as Tr (Σ₁^½·Σ₂·Σ₁^½)^½: the same number, but of symmetric matrices, whose eigenvalues are real
    even when there are fewer samples than features. torchmetrics' own formula is private and tied to its state.

    Raises:
        RequestError: If the feature counts differ or a covariance is not positive semidefinite.
    """
    if first.mean.shape != second.mean.shape:
        raise RequestError(
            f"Fréchet distance of {first.mean.size} and {second.mean.size} features: the numbers must be equal. "
            "Take both sets' features from the same network."
        )
    root = _square_root(first.covariance)
    cross = np.sqrt(_eigenvalues(root @ second.covariance @ root)).sum()
    offset = first.mean - second.mean
    distance = offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross
    return max(float(distance), 0.0)  # rounding may leave −1e-14 for equal statistics


def _square_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: NDArray[np.float64] = (vectors * np.sqrt(_without_rounding(values))) @ vectors.T
    return root


def _eigenvalues(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return _without_rounding(np.linalg.eigvalsh((matrix + matrix.T) / 2).astype(np.float64))


def _without_rounding(eigenvalues: NDArray[np.float64]) -> NDArray[np.float64]:
    if eigenvalues.min() < -_NEGATIVE_TOLERANCE * max(abs(float(eigenvalues.max())), 1e-300):
        raise RequestError(
            f"A covariance has the eigenvalue {eigenvalues.min():.3g}; none may be negative. "
            "Make the statistics with feature_statistics(features)."
        )
    return np.maximum(eigenvalues, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrapInterval:
    """A number with its bootstrap percentile interval; compare intervals, not single numbers."""

    value: float
    low: float
    high: float


def bootstrap_frechet(
    features: Floats,
    reference: FeatureStatistics,
    *,
    labels: NDArray[np.int64] | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the Fréchet distance of `features` to `reference`, and an interval for it from resampled features.

    A resample of N from N holds about 0.63·N distinct vectors, so its distance is biased upwards, as that of any small
    sample is. The interval is therefore the percentiles shifted by (distance − mean of the resampled distances).

    Args:
        features: (N, F), one vector per sampled image.
        reference: Statistics of the real images.
        labels: (N,) classes that were asked for: given, each class is resampled by itself. Do so when the counts per
            class were chosen, not drawn, or the interval is several times too wide.
        resamples: How many; at least 2.
        confidence: Inside (0, 1).
        seed: Of the resampling.

    Raises:
        RequestError: If the features are too few or not finite, or an argument is out of range.
    """
    distance = frechet_distance(feature_statistics(features), reference)
    draws = _resampled_indices(len(features), labels, resamples, seed)
    distances = [frechet_distance(feature_statistics(features[draw]), reference) for draw in draws]
    interval = _interval(distance, np.array(distances), confidence)
    return BootstrapInterval(value=distance, low=max(interval.low, 0.0), high=interval.high)


def bootstrap_frechet_ratio(
    features: Floats,
    baseline: Floats,
    reference: FeatureStatistics,
    *,
    labels: NDArray[np.int64] | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the Fréchet distance of `features` divided by that of `baseline`, with its interval.

    Both are (N, F), row by row from the same labels and seeds: such pairs are resampled together, so what is common to
    both cancels, and a difference of a percent shows long before the two distances' own intervals part.

    Raises:
        RequestError: As `bootstrap_frechet`, or if the shapes differ, or the baseline is at no distance.
    """
    _check_same_shape(features, baseline)

    def ratio(draw: NDArray[np.int64]) -> float:
        below = frechet_distance(feature_statistics(baseline[draw]), reference)
        if below == 0.0:
            raise RequestError(
                "The baseline's Fréchet distance is 0: nothing can be divided by it. Compare the distances themselves."
            )
        return frechet_distance(feature_statistics(features[draw]), reference) / below

    value = ratio(np.arange(len(features)))
    draws = _resampled_indices(len(features), labels, resamples, seed)
    return _interval(value, np.array([ratio(draw) for draw in draws]), confidence)


def bootstrap_mean(
    values: NDArray[np.float64],
    *,
    labels: NDArray[np.int64] | None = None,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the mean of (N,) values with its bootstrap interval; `labels` and the rest as in `bootstrap_frechet`."""
    draws = _resampled_indices(len(values), labels, resamples, seed)
    return _interval(float(values.mean()), np.array([values[draw].mean() for draw in draws]), confidence)


def feature_distance_per_image(actual: Floats, expected: Floats) -> NDArray[np.float64]:
    """Return ‖a/‖a‖ − e/‖e‖‖² of each pair of feature vectors, in [0, 4]: (N, F) → (N,); 0 for the same image.

    The shape of LPIPS (Zhang et al. 2018, arXiv 1801.03924): features scaled to unit length, squared differences. LPIPS
    adds learned weights and sums over a network's layers; here it is the one layer that the network gives.

    Raises:
        RequestError: If the shapes differ or the arrays are empty.
    """
    _check_same_shape(actual, expected)
    apart: NDArray[np.float64] = np.square(_unit_length(actual) - _unit_length(expected)).sum(axis=1)
    return apart


def _unit_length(features: Floats) -> NDArray[np.float64]:
    wide = np.asarray(features, np.float64)
    length: NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return length


def _resampled_indices(
    count: int, labels: NDArray[np.int64] | None, resamples: int, seed: int
) -> Iterator[NDArray[np.int64]]:
    if resamples < 2:
        raise RequestError(f"Bootstrap with {resamples} resamples: at least 2 are needed. The default is 200.")
    if labels is not None and labels.shape != (count,):
        raise RequestError(f"{count} feature vectors with labels of shape {labels.shape}: give one label per vector.")
    generator = np.random.default_rng(seed)
    everything = np.zeros(count, np.int64) if labels is None else labels
    groups = [np.flatnonzero(everything == label) for label in np.unique(everything)]
    for _ in range(resamples):
        yield np.concatenate([generator.choice(group, len(group)) for group in groups])


def _interval(value: float, resampled: NDArray[np.float64], confidence: float) -> BootstrapInterval:
    """Percentiles of `resampled`, moved so that its mean stands at `value`."""
    if not 0.0 < confidence < 1.0:
        raise RequestError(f"Bootstrap with confidence {confidence}: it must be inside (0, 1). The default is 0.95.")
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(resampled, (tail, 1.0 - tail)) + (value - resampled.mean())
    return BootstrapInterval(value=value, low=float(low), high=float(high))


def _difference(actual: Floats, expected: Floats) -> NDArray[np.float64]:
    return np.asarray(actual, np.float64) - np.asarray(expected, np.float64)


def _check_same_shape(actual: Floats, expected: Floats) -> None:
    if actual.shape != expected.shape or actual.size == 0:
        raise RequestError(
            f"Arrays of shape {actual.shape} and {expected.shape} can't be compared: they must be equal and not empty. "
            "Sample both with the same labels."
        )


def _check_range(data_range: float) -> None:
    if not (math.isfinite(data_range) and data_range > 0):
        raise RequestError(f"data_range is {data_range}; it must be positive. Give 2 for images in [−1, 1].")
