"""Labelled grids of small images as PNG: what a person looks at before believing a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from adacorr_deploy.core.bundle import replace_file
from adacorr_deploy.core.errors import OutputError, RequestError
from adacorr_deploy.runtime.images import png_from_picture

DEFAULT_SCALE: Final = 3  # a 28-pixel image becomes 84 pixels wide
_MARGIN: Final = 16
_GAP: Final = 4  # between images of a grid
_BETWEEN_GRIDS: Final = 28
_TEXT_PIXELS: Final = 15
_TITLE_PIXELS: Final = 20
_LINE_SPACING: Final = 1.4
_INK: Final = (30, 30, 30)
_PAPER: Final = (255, 255, 255)
_MISSING_GLYPHS: Final = str.maketrans(  # Pillow's built-in font shows boxes for these
    {"×": "x", "−": "-", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "ρ": "rho", "τ": "tau", "γ": "gamma", "λ": "lambda"}
)
_NOT_FINITE: Final = (255, 0, 255)  # magenta: a NaN must catch the eye


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageGrid:
    """Images under one title, filled row by row.

    Args:
        title: One line above the grid.
        images: (N, C, H, W) in [−1, 1], C = 1 (grey) or 3 (RGB); values outside are clipped, NaN and infinities become
            magenta.
        columns: Images per row; N is a multiple of it.

    Raises:
        RequestError: If the shape or the number of columns doesn't fit.
    """

    title: str
    images: NDArray[np.float32]
    columns: int

    def __post_init__(self) -> None:
        shape = self.images.shape
        if len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape:
            raise RequestError(
                f"Grid {self.title!r} got images of shape {shape}; it takes (N, 1 or 3, H, W). "
                "Decode latents to images first."
            )
        if self.columns < 1 or shape[0] % self.columns:
            raise RequestError(
                f"Grid {self.title!r} got {shape[0]} images for {self.columns} columns; "
                "their number must be a multiple of the columns. Give one label per image, row by row."
            )

    @property
    def rows(self) -> int:
        return len(self.images) // self.columns


def difference_grid(actual: ImageGrid, expected: ImageGrid, *, gain: float = 1.0) -> ImageGrid:
    """Return the absolute difference of two grids, `gain` times brighter: black equal, white 2/gain or more apart.

    Raises:
        RequestError: If the grids have different shapes or `gain` is not positive.
    """
    if actual.images.shape != expected.images.shape or actual.columns != expected.columns:
        raise RequestError(
            f"Grids of {actual.images.shape} in {actual.columns} columns and {expected.images.shape} in "
            f"{expected.columns} have no difference: they must be alike. Sample both with the same labels."
        )
    if not gain > 0:
        raise RequestError(f"The difference's gain is {gain}; it must be positive. 1 shows true brightness.")
    apart = np.abs(actual.images.astype(np.float32) - expected.images.astype(np.float32))
    brighter = "" if gain == 1 else f", {gain:g} times brighter"
    return ImageGrid(
        title=f"absolute difference{brighter}",
        images=np.float32(gain) * apart - np.float32(1.0),
        columns=actual.columns,
    )


def picture_of_grids(
    grids: Sequence[ImageGrid], *, row_names: Sequence[str] = (), title: str = "", scale: int = DEFAULT_SCALE
) -> Image.Image:
    """Return grids side by side with their titles, the rows' names at the left and a title above all.

    Args:
        grids: At least one; all with the same number of rows and images of the same height.
        row_names: One per row, or none.
        title: Above everything; none if empty.
        scale: Each image pixel becomes scale × scale equal pixels.

    Raises:
        RequestError: If the grids don't fit together, the names don't fit the rows or `scale` < 1.
    """
    _check_layout(grids, row_names, scale)
    titled = [_with_title(_grid_body(grid, scale), grid.title) for grid in grids]
    names = _names_column(row_names, grids[0].images.shape[2] * scale + _GAP, titled[0].height)
    heading = _line_height(_TITLE_PIXELS) if title else 0
    height = heading + titled[0].height + 2 * _MARGIN
    width = sum(panel.width for panel in titled) + _BETWEEN_GRIDS * (len(titled) - 1) + 2 * _MARGIN
    width += names.width + _GAP * 2 if names else 0
    canvas = Image.new("RGB", (max(width, _text_width(title, _TITLE_PIXELS) + 2 * _MARGIN), height), _PAPER)
    top, left = _MARGIN, _MARGIN
    _write(canvas, (left, top), title, _TITLE_PIXELS)
    top += heading
    if names:
        canvas.paste(names, (left, top))
        left += names.width + _GAP * 2
    for panel in titled:
        canvas.paste(panel, (left, top))
        left += panel.width + _BETWEEN_GRIDS
    return canvas


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG, whole or not at all; makes the folder.

    Raises:
        OutputError: If the folder is read-only or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, png_from_picture(picture))
    except OSError as error:
        raise OutputError(
            f"{path} can't be written: {error}. Give another output folder with -o, or free space on the disk."
        ) from error


def _check_layout(grids: Sequence[ImageGrid], row_names: Sequence[str], scale: int) -> None:
    shapes = sorted({(grid.rows, grid.images.shape[2]) for grid in grids})
    if len(shapes) != 1:
        raise RequestError(
            f"Grids with (rows, image height) {shapes} can't stand side by side: one pair is needed. "
            "Give at least one grid, all of the same rows and image height."
        )
    if row_names and len(row_names) != shapes[0][0]:
        raise RequestError(f"{len(row_names)} names for {shapes[0][0]} rows: give one per row, or none.")
    if scale < 1:
        raise RequestError(
            f"The picture's scale is {scale}; it must be at least 1. {DEFAULT_SCALE} suits 28×28 images."
        )


def _grid_body(grid: ImageGrid, scale: int) -> Image.Image:
    height, width = grid.images.shape[2] * scale, grid.images.shape[3] * scale
    body = Image.new("RGB", (grid.columns * (width + _GAP) - _GAP, grid.rows * (height + _GAP) - _GAP), _PAPER)
    for index, image in enumerate(_bytes_from_images(grid.images)):
        row, column = divmod(index, grid.columns)
        enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        body.paste(enlarged, (column * (width + _GAP), row * (height + _GAP)))
    return body


def _bytes_from_images(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(N, 1 or 3, H, W) in [−1, 1] → (N, H, W, 3) in 0…255."""
    finite: NDArray[np.bool_] = np.all(np.isfinite(images), axis=1, keepdims=True).transpose(0, 2, 3, 1)
    safe = np.nan_to_num(np.broadcast_to(images, (len(images), 3, *images.shape[2:])).astype(np.float32))
    levels = np.rint((np.clip(safe, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.where(finite, levels, np.array(_NOT_FINITE, np.uint8))


def _with_title(body: Image.Image, title: str) -> Image.Image:
    heading = _line_height(_TEXT_PIXELS)
    panel = Image.new("RGB", (max(body.width, _text_width(title, _TEXT_PIXELS)), body.height + heading), _PAPER)
    _write(panel, (0, 0), title, _TEXT_PIXELS)
    panel.paste(body, (0, heading))
    return panel


def _names_column(names: Sequence[str], row_pixels: int, height: int) -> Image.Image | None:
    if not names:
        return None
    column = Image.new("RGB", (max(_text_width(name, _TEXT_PIXELS) for name in names), height), _PAPER)
    heading = _line_height(_TEXT_PIXELS)
    for row, name in enumerate(names):
        centred = heading + row * row_pixels + (row_pixels - _GAP - _TEXT_PIXELS) // 2
        _write(column, (column.width - _text_width(name, _TEXT_PIXELS), centred), name, _TEXT_PIXELS)
    return column


def _line_height(pixels: int) -> int:
    return round(pixels * _LINE_SPACING)


def _text_width(text: str, pixels: int) -> int:
    return int(ImageFont.load_default(pixels).getlength(_drawable(text))) + 1


def _write(canvas: Image.Image, position: tuple[int, int], text: str, pixels: int) -> None:
    ImageDraw.Draw(canvas).text(position, _drawable(text), fill=_INK, font=ImageFont.load_default(pixels))


def _drawable(text: str) -> str:
    return text.translate(_MISSING_GLYPHS)
