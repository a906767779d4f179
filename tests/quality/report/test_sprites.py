"""What the page shows of images is the images, pixel by pixel, and what it calls a difference is one."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from adacorr_deploy.quality.report.sprites import Sprite, comparison, sprite


def pixels(made: Sprite) -> NDArray[np.uint8]:
    header, _, encoded = made.address.partition(",")
    assert header == "data:image/png;base64"
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert found.shape[:2] == (made.height, made.width)
    return found


def images(count: int, channels: int = 1, side: int = 6) -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (count, channels, side, side)).astype(np.float32)


def test_every_image_stands_at_its_place() -> None:
    made, given = pixels(sprite(images(11))), images(11)
    for index in (0, 7, 8, 10):
        top, left = index // 4 * 7, index % 4 * 7
        expected = np.rint((given[index, 0] + 1) * 127.5)
        np.testing.assert_array_equal(made[top : top + 6, left : left + 6], expected)


@pytest.mark.parametrize(("channels", "dimensions"), [(1, 2), (3, 3), (4, 3)])
def test_one_channel_is_grey_and_three_are_colours(channels: int, dimensions: int) -> None:
    assert pixels(sprite(images(2, channels))).ndim == dimensions


def test_large_images_are_shown_smaller_and_many_are_cut_off() -> None:
    made = sprite(images(20, 3, 300))
    assert made.width <= 4 * 129 and made.height <= 16 / 4 * 129
    assert len(sprite(np.full((1, 1, 4, 4), np.nan, np.float32)).address) > 50


def test_equal_images_have_a_black_difference_and_slight_ones_are_made_visible() -> None:
    base = images(4)
    assert pixels(comparison(base, base).difference)[:6, :6].max() == 0
    slight = comparison(np.clip(base * 0.97, -1, 1).astype(np.float32), base)
    assert slight.gain in {2.0**power for power in range(7)} and slight.gain > 8
    assert pixels(slight.difference)[:6, :6].max() > 60
