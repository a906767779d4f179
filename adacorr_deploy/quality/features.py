"""Networks whose features tell how pictures differ: a user's own as ONNX, or the demo's classifier.

And the features of real images by the same network, for a Fréchet distance to them.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import CheckpointError, RequestError
from adacorr_deploy.plugins.service_parts import has_frames
from adacorr_deploy.quality.metrics import FeatureStatistics, feature_statistics, frechet_distance

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnxruntime as ort

    from adacorr_deploy.core.manifest import Manifest

_BATCH: Final = 100  # images per run: bounds the activations of a large network
_LOG_FATAL_ONLY: Final = 4  # what ONNX Runtime would print comes as exceptions too
_FLOATS: Final = ("tensor(float)",)
_DEMO_NAME: Final = "the bundled Fashion-MNIST classifier, 64 features before the logits"


@runtime_checkable
class FeatureNetwork(Protocol):
    """What a distance of pictures needs to know of a network."""

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return one feature vector per image: (N, C, H, W) float32 → (N, F) float32.

        Samples may leave [−1, 1]; they are clipped first, since what is compared are pictures.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RealFeatures:
    """What is known of real images' features: always their statistics, and the features themselves where they are kept.

    Attributes:
        statistics: Of all of them.
        features: (N, F); None where only statistics are kept, which is not enough for precision and recall.
        name: Where they are from, for people.
    """

    statistics: FeatureStatistics
    features: NDArray[np.float64] | None
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSource:
    """A network, and the real images' features by the same network if there are any.

    Attributes:
        identity: What tells networks apart, for stored results.
    """

    network: FeatureNetwork
    name: str
    identity: str
    real: RealFeatures | None


class OnnxFeatures:
    """An ONNX network on ONNX Runtime's CPU provider: one float32 input (N, C, H, W) in [−1, 1], one float32 output."""

    def __init__(self, path: Path, image_shape: tuple[int, int, int]) -> None:
        """Open a network, and try it on one image.

        Args:
            path: The ONNX file.
            image_shape: (C, H, W) of the images that it will see.

        Raises:
            RequestError: If it is no ONNX network of one image input and one feature output, or takes other images.
        """
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.log_severity_level = _LOG_FATAL_ONLY
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._path = path
        try:
            if not path.is_file():
                raise ValueError("there is no such file")
            self._session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RequestError(
                f"feature network {path} can't be opened: {error}. Give an ONNX file that ONNX Runtime takes."
            ) from error
        self._input = self._check_tensors(self._session.get_inputs(), self._session.get_outputs(), image_shape)
        self.features(np.zeros((2, *image_shape), np.float32))

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return one feature vector per image: (N, C, H, W) float32, clipped to [−1, 1] → (N, F) float32.

        Raises:
            RequestError: If the network fails, or doesn't give finite features for every image.
        """
        shown = np.clip(images, -1.0, 1.0).astype(np.float32)
        batches = [self._run(shown[first : first + _BATCH]) for first in range(0, len(shown), _BATCH)]
        return np.concatenate(batches)

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            (output,) = self._session.run(None, {self._input: images})
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise RequestError(
                f"feature network {self._path} fails on images of shape {images.shape}: {error}. "
                "It must take any number of them: export it with a dynamic first axis."
            ) from error
        given = np.asarray(output)
        if given.ndim < 2 or len(given) != len(images) or not np.isfinite(given).all():
            raise RequestError(
                f"feature network {self._path} gave an output of shape {given.shape} for {len(images)} images"
                f"{'' if np.isfinite(given).all() else ' that holds NaN or infinity'}; "
                "finite features of shape (images, F) are needed."
            )
        return given.reshape(len(images), -1).astype(np.float32)

    def _check_tensors(
        self, inputs: Sequence[ort.NodeArg], outputs: Sequence[ort.NodeArg], image_shape: tuple[int, int, int]
    ) -> str:
        """Return the name of the image input."""
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type not in _FLOATS or outputs[0].type not in _FLOATS:
            found = ", ".join(f"{tensor.name} {tensor.type}" for tensor in (*inputs, *outputs))
            raise RequestError(
                f"feature network {self._path} has {len(inputs)} inputs and {len(outputs)} outputs ({found}); "
                "one float32 input and one float32 output are needed. Export it so."
            )
        shape: list[int | str | None] = inputs[0].shape
        fits = len(shape) == 4 and all(
            not isinstance(size, int) or size == wanted for size, wanted in zip(shape[1:], image_shape, strict=True)
        )
        if not fits:
            raise RequestError(
                f"feature network {self._path} takes an input of shape {shape}; this model's images are "
                f"(N, {', '.join(map(str, image_shape))}) in [-1, 1]. "
                "Put what resizes or repeats channels into the network."
            )
        name: str = inputs[0].name
        return name


def real_features_from_file(path: Path) -> RealFeatures:
    """Read the features of real images: safetensors with `features` (N, F), or `mean`, `covariance` and a `count`.

    Raises:
        RequestError: If the file is missing, no safetensors file, or holds neither.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            if "features" in file.keys():  # noqa: SIM118  no mapping
                features = np.asarray(file.get_tensor("features"), np.float64)
                return RealFeatures(statistics=feature_statistics(features), features=features, name=path.name)
            count = int((file.metadata() or {})["count"])
            statistics = FeatureStatistics(
                mean=np.asarray(file.get_tensor("mean"), np.float64),
                covariance=np.asarray(file.get_tensor("covariance"), np.float64),
                count=count,
            )
            frechet_distance(statistics, statistics)  # refuses a covariance that is none: better now than after hours
            return RealFeatures(statistics=statistics, features=None, name=path.name)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RequestError) as error:
        raise RequestError(
            f"{path} holds no features of real images: {error}. It takes a safetensors file with a tensor features "
            "(N, F), or with mean (F), covariance (F, F) and the metadata entry count."
        ) from error


def feature_source(manifest: Manifest, network: Path | None, real: Path | None) -> FeatureSource | None:
    """Return the network to measure a bundle's images with: the given one, the demo's for the demo, or None.

    Args:
        manifest: The bundle's.
        network: An ONNX file.
        real: Features of real images by that network; None for the demo's own, or for none.

    Raises:
        RequestError: If a file is not valid, the network takes other images, features are given without a network, or
            the model makes clips.
    """
    if has_frames(manifest.model):
        if network is None and real is None:
            return None
        raise RequestError(
            f"{manifest.model_name} makes clips, and features are of images. Leave --features and --reference-features "
            "out."
        )
    if network is not None:
        opened = OnnxFeatures(network, image_shape(manifest))
        source = FeatureSource(
            network=opened,
            name=network.name,
            identity=_sha256(network),
            real=real_features_from_file(real) if real else None,
        )
    elif _is_demo(manifest):
        source = _demo_source(real)
    elif real is not None:
        raise RequestError(
            f"{real} holds features of real images, and no network is given that makes the samples'. Add --features."
        )
    else:
        return None
    if source.real is not None:
        width = source.network.features(np.zeros((1, *image_shape(manifest)), np.float32)).shape[1]
        if source.real.statistics.mean.size != width:
            raise RequestError(
                f"{source.real.name} holds {source.real.statistics.mean.size} features per image, "
                f"{source.name} gives {width}. Take both from the same network."
            )
    return source


def image_shape(manifest: Manifest) -> tuple[int, int, int]:
    """Return the (C, H, W) of the images that features are taken of: decoded ones where the bundle has a decoder."""
    decoder = manifest.decoder
    channels, height, width = manifest.model.latent_shape
    return (
        (channels, height, width)
        if decoder is None
        else (decoder.channels, height * decoder.scale, width * decoder.scale)
    )


def _is_demo(manifest: Manifest) -> bool:
    """Say whether the images are of the demo's data set: the classifier knows nothing of others."""
    if image_shape(manifest) != (1, 28, 28) or importlib.util.find_spec("torch") is None:
        return False
    classes = json.loads((files("adacorr_deploy") / "demo" / "labels.json").read_text(encoding="utf-8"))
    return manifest.class_names == tuple(classes)


def _demo_source(real: Path | None) -> FeatureSource:
    from adacorr_deploy.quality.classifier import load_classifier, load_reference_statistics

    reference = (
        real_features_from_file(real)
        if real is not None
        else RealFeatures(
            statistics=load_reference_statistics(), features=None, name="the 60 000 training images of Fashion-MNIST"
        )
    )
    return FeatureSource(network=load_classifier(), name=_DEMO_NAME, identity="demo-classifier", real=reference)


def _sha256(path: Path) -> str:
    from adacorr_deploy.core.manifest import file_record

    try:
        return file_record(path).sha256
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}. Give a file that can.") from error
