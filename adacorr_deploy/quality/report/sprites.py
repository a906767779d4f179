"""Images for the page: many small ones as one PNG inside a data address."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adacorr_deploy.quality.bench_sampling import SHOWN_IMAGES, SHOWN_SIDE
from adacorr_deploy.runtime.images import png_from_picture

_COLUMNS: Final = 4
_GAP: Final = 1
_MOST_GAIN: Final = 64.0

Images = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sprite:
    """Images side by side; `address` goes into an img's src."""

    address: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A policy's images, the uncached ones and their difference, `gain` times brighter."""

    own: Sprite
    difference: Sprite
    gain: float


def comparison(images: Images, uncached: Images) -> Comparison:
    """Return a policy's images and how they differ from the uncached: (N, C, H, W) each.

    The difference is as much brighter as makes its 99th percentile clearly seen, a power of two.
    """
    mine, base = images[:SHOWN_IMAGES], uncached[:SHOWN_IMAGES]
    apart = np.abs(np.clip(mine, -1, 1) - np.clip(base, -1, 1))
    typical = float(np.quantile(apart, 0.99))
    gain = min(_MOST_GAIN, 2.0 ** np.floor(np.log2(1.0 / typical))) if typical > 0 else 1.0
    gain = max(gain, 1.0)
    return Comparison(own=sprite(mine), difference=sprite(apart * np.float32(gain) - np.float32(1.0)), gain=gain)


def sprite(images: Images) -> Sprite:
    """Return images in rows of four, (N, C, H, W) in [−1, 1]: grey, or its first three channels as colours."""
    shown = images[:SHOWN_IMAGES]
    levels = np.rint((np.clip(np.nan_to_num(shown), -1, 1) + 1) * 127.5).astype(np.uint8)
    channels = levels[:, :3] if levels.shape[1] >= 3 else np.repeat(levels[:, :1], 3, axis=1)
    step = -(-max(channels.shape[2:]) // SHOWN_SIDE)
    small = channels[:, :, ::step, ::step].transpose(0, 2, 3, 1)
    count, height, width, _ = small.shape
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    size = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3)
    canvas = np.full(size, 128, np.uint8)
    for index, image in enumerate(small):
        top, left = (index // columns) * (height + _GAP), (index % columns) * (width + _GAP)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    grey = picture.convert("L") if levels.shape[1] < 3 else picture
    encoded = base64.b64encode(png_from_picture(grey)).decode()
    return Sprite(address=f"data:image/png;base64,{encoded}", width=size[1], height=size[0])
