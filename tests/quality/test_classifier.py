"""The shipped classifier and its reference statistics belong together, and other files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from adacorr_deploy.core.errors import CheckpointError, RequestError
from adacorr_deploy.quality.classifier import (
    CLASSES,
    FEATURES,
    ClassifierNet,
    load_classifier,
    load_reference_statistics,
)
from adacorr_deploy.quality.features import FeatureNetwork
from adacorr_deploy.quality.metrics import feature_statistics, frechet_distance

TEST_IMAGES = Path("/usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz")


def noise_images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (count, 1, 28, 28)).astype(np.float32)


def test_it_is_a_feature_network_of_the_promised_shapes() -> None:
    classifier = load_classifier()
    assert isinstance(classifier, FeatureNetwork)
    features, logits = classifier.features(noise_images(3)), classifier.logits(noise_images(3))
    assert features.shape == (3, FEATURES)
    assert features.dtype == np.float32
    assert logits.shape == (3, CLASSES)


def test_an_images_features_do_not_depend_on_its_batch() -> None:
    """Batch norm must use its stored statistics, and splitting into batches must lose or mix nothing."""
    classifier, images = load_classifier(), noise_images(503)
    together = classifier.features(images)
    alone = np.concatenate([classifier.features(images[index : index + 1]) for index in (0, 499, 500, 502)])
    np.testing.assert_allclose(together[[0, 499, 500, 502]], alone, rtol=1e-4, atol=1e-5)


def test_samples_beyond_white_and_black_count_as_the_pictures_they_make() -> None:
    classifier, images = load_classifier(), noise_images(2)
    np.testing.assert_array_equal(classifier.features(3 * images), classifier.features(np.clip(3 * images, -1, 1)))
    assert not np.array_equal(classifier.features(3 * images), classifier.features(images))


def test_loading_twice_gives_the_same_network() -> None:
    np.testing.assert_array_equal(
        load_classifier().features(noise_images(2)), load_classifier().features(noise_images(2))
    )


def test_the_reference_statistics_are_of_the_whole_training_split() -> None:
    statistics = load_reference_statistics()
    assert statistics.count == 60_000
    assert statistics.mean.shape == (FEATURES,)
    assert statistics.mean.dtype == np.float64
    assert frechet_distance(statistics, statistics) < 1e-6 * np.trace(statistics.covariance)


def test_noise_is_far_from_the_reference() -> None:
    """A sanity floor: images that are no garments must be much farther than the features' own spread."""
    reference = load_reference_statistics()
    noise = feature_statistics(load_classifier().features(noise_images(200)))
    assert frechet_distance(noise, reference) > 0.5 * np.trace(reference.covariance)


@pytest.mark.skipif(not TEST_IMAGES.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_test_images_are_near_the_reference_and_recognised() -> None:
    import gzip

    with gzip.open(TEST_IMAGES) as file:
        raw = np.frombuffer(file.read(16 + 784 * 2000), np.uint8, offset=16)
    with gzip.open(TEST_IMAGES.with_name("t10k-labels-idx1-ubyte.gz")) as file:
        labels = np.frombuffer(file.read(8 + 2000), np.uint8, offset=8)
    images = (raw.reshape(-1, 1, 28, 28) / 127.5 - 1).astype(np.float32)
    classifier, reference = load_classifier(), load_reference_statistics()
    assert (classifier.logits(images).argmax(axis=1) == labels).mean() >= 0.91
    distance = frechet_distance(feature_statistics(classifier.features(images)), reference)
    assert distance < 0.05 * np.trace(reference.covariance)


@pytest.mark.parametrize("shape", [(0, 1, 28, 28), (28, 28), (2, 3, 28, 28), (2, 1, 32, 32)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"takes \(N, 1, 28, 28\)"):
        load_classifier().features(np.zeros(shape, np.float32))


def test_images_with_nan_are_refused() -> None:
    images = noise_images(2)
    images[1, 0, 0, 0] = np.nan
    with pytest.raises(RequestError, match="NaN"):
        load_classifier().features(images)


def test_a_missing_or_truncated_or_foreign_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    truncated, foreign = tmp_path / "truncated.safetensors", tmp_path / "foreign.safetensors"
    truncated.write_bytes(b"\x20\x00\x00")
    save_file({"weight": np.zeros(3, np.float32)}, foreign)
    for path in (tmp_path / "missing.safetensors", truncated, foreign):
        with pytest.raises(CheckpointError, match=path.name):
            load_classifier(path)
        with pytest.raises(CheckpointError, match=path.name):
            load_reference_statistics(path)


def test_statistics_that_do_not_fit_together_are_a_checkpoint_error(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    save_file({"mean": np.zeros(3), "covariance": np.zeros((2, 2))}, path, metadata={"count": json.dumps(10)})
    with pytest.raises(CheckpointError, match="covariance"):
        load_reference_statistics(path)


def test_the_network_is_small() -> None:
    """The package carries it: at most 2 MB of float32."""
    assert sum(value.numel() for value in ClassifierNet().state_dict().values()) * 4 < 2_000_000
