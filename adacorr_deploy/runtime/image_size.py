"""The size of images as people say it, in pixels, and of clips, in frames: from it, that of the latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.shapes import FRAMES, HEIGHT, WIDTH
from adacorr_deploy.core.untrusted import clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class SideRange:
    """What a side of an image, in pixels, or a clip in frames, may be."""

    smallest: int
    largest: int
    multiple: int
    default: int

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return f"{self.smallest} alone"
        return f"{self.smallest} … {self.largest}" + (f", in multiples of {self.multiple}" if self.multiple > 1 else "")


def image_ranges(manifest: Manifest) -> dict[str, SideRange]:
    """Return what requests may ask for, by axis: width and height in pixels, and frames where there are some.

    A bundle without a decoder gives latents, so pixels are theirs.
    """
    latents = manifest.model.latents
    scale = manifest.decoder.scale if manifest.decoder is not None else 1
    found = {}
    for (axis, low, high), patch, default in zip(latents.ranges, latents.patch, latents.shape[1:], strict=True):
        pixels = 1 if axis == FRAMES else scale
        found[axis] = SideRange(
            smallest=pixels * low, largest=pixels * high, multiple=pixels * patch, default=pixels * default
        )
    return found


def latent_size(
    manifest: Manifest, *, pixels: Sequence[int] | None = None, frames: int | None = None
) -> LatentSize | None:
    """Return the latents' size, (H, W) or (F, H, W), of images of so many pixels; None is the model's default.

    Args:
        manifest: Of the bundle.
        pixels: Width and height, as `image_ranges` has them; None: the default.
        frames: Of a clip; None: the default.

    Raises:
        RequestError: If the model doesn't take this size; the message says what it takes.
    """
    if pixels is None and frames is None:
        return None
    ranges = image_ranges(manifest)
    if frames is not None and FRAMES not in ranges:
        raise RequestError(f"frames is {clipped(frames)}, and this model makes no clips. Leave it out.")
    if pixels is not None and len(pixels) != 2:
        raise RequestError(f"size is {clipped(pixels)}, allowed is a width and a height.")
    asked = dict(zip((WIDTH, HEIGHT), pixels or (), strict=False))
    if frames is not None:
        asked[FRAMES] = frames
    for axis, length in asked.items():
        _check(axis, length, ranges[axis])
    scale = manifest.decoder.scale if manifest.decoder is not None else 1
    sizes = {axis: asked.get(axis, side.default) for axis, side in ranges.items()}
    return tuple(length if axis == FRAMES else length // scale for axis, length in sizes.items())


def _check(axis: str, given: object, allowed: SideRange) -> None:
    fits = isinstance(given, int) and not isinstance(given, bool) and not given % allowed.multiple
    if not fits or not isinstance(given, int) or not allowed.smallest <= given <= allowed.largest:
        what = f"frames is {clipped(given)}" if axis == FRAMES else f"size: {axis} is {clipped(given)} pixels"
        raise RequestError(f"{what}, this model takes {allowed}.")
