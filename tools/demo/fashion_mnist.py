"""Fashion-MNIST as Debian's package `dataset-fashion-mnist` installs it (MIT licence, Zalando Research)."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATASET_DIR = Path("/usr/share/datasets/fashion-mnist")
CLASS_NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def load_split(split: str, directory: Path = DATASET_DIR) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return (images, labels) of one split: (N, 28, 28) uint8 in 0..255 and (N,) int64 in 0..9.

    Args:
        split: "train" (60 000 images) or "t10k" (10 000).
        directory: Where the four IDX files lie.

    Raises:
        FileNotFoundError: If the data set is not installed.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist. Install it with: apt-get install dataset-fashion-mnist")
    with gzip.open(directory / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(directory / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return images, labels
