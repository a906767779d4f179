"""Invariant: a PNG holds the model's pixels and nothing else, under a name that tells the class and the seed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from adacorr_deploy.cli.image_files import Naming, Sampled, png_files


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def sampled(labels: tuple[int, ...], *, channels: int = 1, names: tuple[str, ...] | None = None) -> Sampled:
    shape = (len(labels), channels, 4, 5)
    pixels = np.linspace(-1.2, 1.2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return Sampled(pixels=pixels, naming=Naming(labels=labels, class_names=names, seed=3))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_pixels_are_the_latents_in_256_levels(channels: int, mode: str) -> None:
    images = sampled((0, 1), channels=channels)
    for png, expected in zip(list(png_files(images, "t").values())[:2], images.pixels, strict=True):
        assert opened(png).mode == mode
        levels = np.asarray(opened(png)).reshape(4, 5, channels).transpose(2, 0, 1)
        assert np.abs(levels / 127.5 - 1 - expected.clip(-1, 1)).max() <= 0.5 / 127.5 + 1e-6


def test_names_tell_index_class_and_seed() -> None:
    names = ("../etc", "Größe", "x" * 99)
    assert list(png_files(sampled((0, 1, 2), names=names), "t")) == [
        "00_etc_seed3.png",
        "01_gr-e_seed3.png",
        f"02_{'x' * 40}_seed3.png",
        "grid.png",
    ]
    assert list(png_files(sampled((5,)), "t")) == ["00_class-5_seed3.png", "grid.png"]
    assert list(png_files(sampled((5,), names=names), "t")) == ["00_class-5_seed3.png", "grid.png"]
    assert list(png_files(sampled((0,) * 101), "t"))[100] == "100_class-0_seed3.png"


def test_a_grid_has_a_column_for_each_class_and_a_row_for_each_repetition() -> None:
    def size(*labels: int) -> tuple[int, int]:
        return opened(png_files(sampled(labels, names=tuple("abcdefghijklmno")), "")["grid.png"]).size

    one = size(0)
    assert size(0, 0, 0)[0] == one[0]
    assert size(0, 0, 0)[1] > size(0, 0)[1] > one[1]
    assert size(0, 1)[0] > one[0]
    assert size(0, 1) == size(1, 0)
    assert size(*range(11)) == (size(*range(10))[0], 2 * one[1])  # after ten classes, a second band
    assert size(0, 1, 0, 0) == (size(0, 1)[0], size(0, 0, 0)[1])
