"""A small Fashion-MNIST classifier whose features serve a Fréchet distance; the demo's stand-in for Inception.

It is a `FeatureNetwork` of `quality.features`: any other comes from an ONNX file there.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from adacorr_deploy.core.errors import CheckpointError, RequestError
from adacorr_deploy.quality.metrics import FeatureStatistics

FEATURES: Final = 64
CLASSES: Final = 10
_SIDE: Final = 28
_BATCH: Final = 500  # bounds the activations to some 50 MB
_WEIGHTS_NAME: Final = "classifier.safetensors"
_STATISTICS_NAME: Final = "reference_features.safetensors"


class ClassifierNet(nn.Module):
    """Three convolutions and a 64-wide feature layer: images (N, 1, 28, 28) in [−1, 1] → logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *_convolution(1, 32), nn.MaxPool2d(2), *_convolution(32, 64), nn.MaxPool2d(2), *_convolution(64, 128)
        )
        self.to_features = nn.Linear(128, FEATURES)
        self.to_logits = nn.Linear(FEATURES, CLASSES)

    def extract_features(self, images: Tensor) -> Tensor:
        """Return the layer before the logits, ahead of its ReLU: (N, F). Unrectified, it is closer to a Gaussian."""
        features: Tensor = self.to_features(self.backbone(images).mean(dim=(2, 3)))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.to_logits(self.extract_features(images).relu())
        return logits


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()


class Classifier:
    """The trained network behind a NumPy interface; a `FeatureNetwork`."""

    def __init__(self, net: ClassifierNet) -> None:
        self._net = net.eval().requires_grad_(False)

    def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return feature vectors: (N, 1, 28, 28) float32, clipped to [−1, 1] → (N, 64) float32.

        Raises:
            RequestError: If the images have another shape or hold a NaN or an infinity.
        """
        return self._in_batches(self._net.extract_features, images)

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return class logits: (N, 1, 28, 28) float32, clipped to [−1, 1] → (N, 10) float32; raises as `features`."""
        return self._in_batches(self._net, images)

    def _in_batches(self, function: Callable[[Tensor], Tensor], images: NDArray[np.float32]) -> NDArray[np.float32]:
        _check_images(images)
        with torch.inference_mode():
            batches = torch.from_numpy(np.clip(images, -1.0, 1.0).astype(np.float32)).split(_BATCH)
            return torch.cat([function(batch) for batch in batches]).numpy()


def _check_images(images: NDArray[np.float32]) -> None:
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1:] != (1, _SIDE, _SIDE):
        raise RequestError(
            f"The demo classifier got images of shape {images.shape}; it takes (N, 1, 28, 28) with N ≥ 1. "
            "For other images give your own feature network."
        )
    if not np.isfinite(images).all():
        raise RequestError(
            "The demo classifier got images with NaN or infinity; it takes finite values in [−1, 1]. "
            "Look at the run's trace for the step where they appeared."
        )


def load_classifier(path: Path | None = None) -> Classifier:
    """Load the classifier's weights: the shipped ones, or those at `path` (safetensors).

    Raises:
        CheckpointError: If the file is missing or truncated, or does not hold this network's weights.
    """
    if path is None:
        with as_file(files("adacorr_deploy") / "demo" / _WEIGHTS_NAME) as shipped:
            return load_classifier(shipped)
    net = ClassifierNet()
    try:
        net.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not hold the classifier's weights: {error}. "
            "Reinstall adacorr-deploy, or make it again with: python tools/demo/train_classifier.py"
        ) from error
    return Classifier(net)


def load_reference_statistics(path: Path | None = None) -> FeatureStatistics:
    """Load the feature statistics of the 60 000 training images, so that no data set is needed at run time.

    Raises:
        CheckpointError: If the file is missing or truncated, or holds no statistics.
    """
    if path is None:
        with as_file(files("adacorr_deploy") / "demo" / _STATISTICS_NAME) as shipped:
            return load_reference_statistics(shipped)
    try:
        with safe_open(path, framework="numpy") as file:
            count = int(file.metadata()["count"])
            return FeatureStatistics(
                mean=file.get_tensor("mean"), covariance=file.get_tensor("covariance"), count=count
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RequestError) as error:
        raise CheckpointError(
            f"{path} does not hold feature statistics: {error}. "
            "Reinstall adacorr-deploy, or make it again with: python tools/demo/train_classifier.py"
        ) from error
