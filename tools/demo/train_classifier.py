"""Train the demo's classifier on Fashion-MNIST; store its weights and its features' statistics of the training images.

    python tools/demo/train_classifier.py [-o adacorr_deploy/demo] [--epochs 15]

About seven minutes on one core (bfloat16 convolutions where the processor has them). Leaves `classifier.safetensors`
and `reference_features.safetensors`, and prints the test accuracy, taken in float32 on the weights of the last epoch:
no epoch is chosen by its test accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from fashion_mnist import load_split
from numpy.typing import NDArray
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from adacorr_deploy.quality.classifier import Classifier, ClassifierNet, load_classifier
from adacorr_deploy.quality.metrics import feature_statistics

BATCH = 128
PEAK_LEARNING_RATE = 4e-3
READABLE = 0o644  # safetensors makes its files private
PACKAGE_DEMO = Path(__file__).resolve().parents[2] / "adacorr_deploy" / "demo"


def scaled_images(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images as the DiT sees them: (N, 28, 28) uint8 → (N, 1, 28, 28) float32 in [−1, 1]."""
    return (raw.astype(np.float32) / 127.5 - 1.0)[:, None]


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Mirror half of the images and move the batch by up to two pixels."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=draw) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    down, right = torch.randint(0, 5, (2,), generator=draw).tolist()
    return functional.pad(images, (2, 2, 2, 2), value=-1.0)[:, :, down : down + 28, right : right + 28]


def train(images: Tensor, labels: Tensor, epochs: int) -> ClassifierNet:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    net = ClassifierNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps)
    for epoch in range(epochs):
        started, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(images), generator=draw)[: steps * BATCH].split(BATCH):
            batch = augmented(images[chosen], draw).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(batch)
            loss = functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / steps:.4f}  {time.perf_counter() - started:.0f} s", flush=True
        )
    return net


def accuracy(classifier: Classifier, split: str) -> float:
    raw, labels = load_split(split)
    return float((classifier.logits(scaled_images(raw)).argmax(axis=1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=PACKAGE_DEMO)
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # leaves the other cores to the DiT's training
    raw, labels = load_split("train")
    images = scaled_images(raw)
    net = train(torch.from_numpy(images), torch.from_numpy(labels), args.epochs)
    weights = args.output / "classifier.safetensors"
    save_file(net.state_dict(), weights)
    weights.chmod(READABLE)
    classifier = load_classifier(weights)
    statistics = feature_statistics(classifier.features(images))
    statistics_file = args.output / "reference_features.safetensors"
    save_arrays(
        {"mean": statistics.mean, "covariance": statistics.covariance},
        statistics_file,
        metadata={"count": json.dumps(statistics.count), "images": "Fashion-MNIST, training split, as stored"},
    )
    statistics_file.chmod(READABLE)
    print(f"accuracy: train {accuracy(classifier, 'train'):.4f}, test {accuracy(classifier, 't10k'):.4f}")


if __name__ == "__main__":
    main()
