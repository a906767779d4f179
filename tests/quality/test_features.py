"""A user's network is taken if it maps these images to features, and otherwise refused by what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.manifest import Manifest, manifest_from_json
from adacorr_deploy.quality.features import FeatureNetwork, OnnxFeatures, feature_source, real_features_from_file
from tests.models import model_spec
from tests.runtime.conftest import write_bundle
from tests.runtime.tiny_dit import TinyDiT

SHAPE = (1, 4, 4)
WEIGHTS = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)


def network(path: Path, *, images: tuple[int | str, ...] = ("n", *SHAPE), kind: int = TensorProto.FLOAT) -> Path:
    """Save a network of one matrix: pixels → five features."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["features"])],
        "net",
        [helper.make_tensor_value_info("images", kind, images)],
        [helper.make_tensor_value_info("features", kind, ("n", 5))],
        [numpy_helper.from_array(WEIGHTS.astype(helper.tensor_dtype_to_np_dtype(kind)), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(-2, 2, (count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    bundle = write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", TinyDiT())
    return manifest_from_json((bundle / "manifest.json").read_text(), where="tiny")


def test_its_features_are_those_of_the_clipped_images_in_any_number(tmp_path: Path) -> None:
    opened = OnnxFeatures(network(tmp_path / "net.onnx"), SHAPE)
    assert isinstance(opened, FeatureNetwork)
    given = images(230)
    expected = np.clip(given, -1, 1).reshape(230, -1) @ WEIGHTS
    np.testing.assert_allclose(opened.features(given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ("n", 4, 2, 2)}, r"takes an input of shape .*4, 2, 2.*images are \(N, 1, 4, 4\)"),
        ({"images": ("n", 16)}, "takes an input of shape"),
        ({"images": (1, *SHAPE)}, r"(?s)fails on images of shape .* export it with a dynamic first axis"),
        ({"kind": TensorProto.DOUBLE}, r"one float32 input and one float32 output are needed"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    path = network(tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=message):
        OnnxFeatures(path, SHAPE)


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_text("no")
    for name in ("no.onnx", "missing.onnx"):
        with pytest.raises(RequestError, match=f"{name} can't be opened"):
            OnnxFeatures(tmp_path / name, SHAPE)


def test_real_features_are_read_one_by_one_or_as_statistics(tmp_path: Path) -> None:
    features = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
    save_file({"features": features}, tmp_path / "all.safetensors")
    found = real_features_from_file(tmp_path / "all.safetensors")
    assert found.features is not None and found.statistics.count == 40
    statistics = {"mean": found.statistics.mean, "covariance": found.statistics.covariance}
    save_file(statistics, tmp_path / "some.safetensors", metadata={"count": "40"})
    other = real_features_from_file(tmp_path / "some.safetensors")
    assert other.features is None and other.statistics.count == 40
    np.testing.assert_array_equal(other.statistics.covariance, found.statistics.covariance)


@pytest.mark.parametrize(
    "tensors", [{"mean": np.zeros(3)}, {"features": np.full((5, 2), np.nan)}, {"features": np.zeros((1, 2))}, {}]
)
def test_a_file_without_usable_features_is_refused(tmp_path: Path, tensors: dict[str, NDArray[np.float64]]) -> None:
    save_file(tensors, tmp_path / "no.safetensors")
    with pytest.raises(RequestError, match="holds no features of real images"):
        real_features_from_file(tmp_path / "no.safetensors")


@pytest.mark.parametrize("count", ["Infinity", "[" * 100_000, "many", "1"])
def test_a_count_of_features_that_is_none_is_refused(tmp_path: Path, count: str) -> None:
    statistics = {"mean": np.zeros(2), "covariance": np.eye(2)}
    save_file(statistics, tmp_path / "no.safetensors", metadata={"count": count})
    with pytest.raises(RequestError, match="holds no features of real images"):
        real_features_from_file(tmp_path / "no.safetensors")


def test_statistics_that_no_features_have_are_refused_before_anything_is_compared_with_them(tmp_path: Path) -> None:
    statistics = {"mean": np.zeros(2), "covariance": np.diag([1.0, -1.0])}
    save_file(statistics, tmp_path / "no.safetensors", metadata={"count": "40"})
    with pytest.raises(RequestError, match=r"holds no features of real images: .* eigenvalue -1"):
        real_features_from_file(tmp_path / "no.safetensors")


def test_the_bundled_classifier_is_for_the_demos_images_alone(manifest: Manifest, tmp_path: Path) -> None:
    assert feature_source(manifest, None, None) is None
    demo = model_spec(latent_shape=(1, 28, 28), num_classes=10)
    names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    found = feature_source(manifest.model_copy(update={"model": demo, "class_names": names}), None, None)
    assert found is not None and found.real is not None and found.real.statistics.count == 60_000
    digits = manifest.model_copy(update={"model": demo, "class_names": tuple("0123456789")})
    assert feature_source(digits, None, None) is None


def test_features_of_another_network_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", images=("n", *manifest.model.latent_shape))
    save_file({"features": np.zeros((9, 7))}, tmp_path / "real.safetensors")
    with pytest.raises(RequestError, match=r"real.safetensors holds 7 features per image, net.onnx gives 5"):
        feature_source(manifest, path, tmp_path / "real.safetensors")
    with pytest.raises(RequestError, match="no network is given"):
        feature_source(manifest, None, tmp_path / "real.safetensors")
