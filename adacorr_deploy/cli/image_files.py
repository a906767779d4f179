"""From sampled pixels to PNG files: one for each image, and a labelled grid of all."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adacorr_deploy.quality.pictures import ImageGrid, picture_of_grids
from adacorr_deploy.runtime.images import picture_from_pixels, png_from_picture

GRID_NAME: Final = "grid.png"

_COLUMNS: Final = 10  # classes side by side in a grid
_SHOWN_PIXELS: Final = 84  # small images are enlarged to about this height in a grid
_NAME_CHARACTERS: Final = 40
_TITLE_CHARACTERS: Final = 24
_WHITE: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """What images are called."""

    labels: tuple[int, ...]  # of each image; of prompts, which of them it shows
    class_names: tuple[str, ...] | None  # by label
    seed: int
    kind: str = "class"  # what a label without a name stands for

    @classmethod
    def of_prompts(cls, prompts: Sequence[str], images: int, *, seed: int) -> Naming:
        """Return the names of images of so many prompts; without any, embeddings were given, which say nothing."""
        if not prompts:
            return cls(labels=tuple(range(images)), class_names=None, seed=seed, kind="embeddings")
        distinct = list(dict.fromkeys(prompts))
        names = tuple(textwrap.shorten(prompt, _TITLE_CHARACTERS, placeholder=" …") or "no text" for prompt in distinct)
        labels = tuple(distinct.index(prompt) for prompt in prompts)
        return cls(labels=labels, class_names=names, seed=seed, kind="prompt")

    def name(self, label: int) -> str:
        names = self.class_names or ()
        return names[label] if label < len(names) else f"{self.kind} {label}"

    def stems(self) -> list[str]:
        """Return what the images or clips are called, in order."""
        width = max(2, len(str(len(self.labels) - 1)))
        return [
            f"{index:0{width}d}_{_file_word(self.name(label), self.kind)}_seed{self.seed}"
            for index, label in enumerate(self.labels)
        ]

    def file_names(self) -> list[str]:
        """Return what the images' files are called, in order."""
        return [f"{stem}.png" for stem in self.stems()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Images or clips, and what they are called."""

    pixels: NDArray[np.float32]  # (B, C, H, W) or (B, F, C, H, W) in [−1, 1], C of PIXEL_CHANNELS
    naming: Naming


def png_files(sampled: Sampled, title: str) -> Mapping[str, bytes]:
    """Return the PNG of each image by its file's name, in order, and last the grid's. Same pixels, same bytes."""
    pngs = (png_from_picture(picture_from_pixels(image)) for image in sampled.pixels)
    files = dict(zip(sampled.naming.file_names(), pngs, strict=True))
    return {**files, GRID_NAME: grid_png(sampled, title)}


def grid_png(sampled: Sampled, title: str) -> bytes:
    """Return the PNG of all images, (B, C, H, W), under their classes."""
    return png_from_picture(_grid(sampled, title))


def _grid(sampled: Sampled, title: str) -> Image.Image:
    """One column for each class, its images below one another; after ten classes a new band of columns begins."""
    labels = list(dict.fromkeys(sampled.naming.labels))
    scale = max(1, _SHOWN_PIXELS // sampled.pixels.shape[2])
    bands = [
        picture_of_grids(_panels(sampled, labels[first : first + _COLUMNS]), title="" if first else title, scale=scale)
        for first in range(0, len(labels), _COLUMNS)
    ]
    return _stacked(bands)


def _panels(sampled: Sampled, labels: Sequence[int]) -> list[ImageGrid]:
    of_label = {label: sampled.pixels[np.equal(sampled.naming.labels, label)] for label in labels}
    rows = max(len(images) for images in of_label.values())
    return [
        ImageGrid(title=sampled.naming.name(label), images=_filled(images, rows), columns=1)
        for label, images in of_label.items()
    ]


def _filled(images: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    blank = np.full((rows - len(images), *images.shape[1:]), _WHITE, dtype=np.float32)
    return np.concatenate([images, blank])


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    size = (max(picture.width for picture in pictures), sum(picture.height for picture in pictures))
    canvas = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas


def _file_word(name: str, otherwise: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:_NAME_CHARACTERS] or otherwise
