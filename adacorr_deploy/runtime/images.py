"""From pixels in [−1, 1] to 8-bit levels and PNG files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from adacorr_deploy.core.manifest import Manifest

PIXEL_CHANNELS: Final = (1, 3)  # grey or RGB: latents that are the image itself
_IMAGE_AXES: Final = 4  # of a batch of images; clips have one more


def gives_images(manifest: Manifest) -> bool:
    """Say whether a bundle gives images: its latents are pixels, or it holds what decodes them."""
    return manifest.decoder is not None or manifest.model.latent_shape[0] in PIXEL_CHANNELS


def levels_from_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(…, C, H, W) in [−1, 1] → (…, H, W, C) in 0 … 255; values outside are clipped."""
    levels = np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))


def pixels_from_latents(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return images (B, C, H, W) as they are, clips (B, C, F, H, W) as (B, F, C, H, W); of latents that are pixels."""
    return latents if latents.ndim == _IMAGE_AXES else latents.swapaxes(1, 2)


def picture_from_pixels(image: NDArray[np.float32]) -> Image.Image:
    """(C, H, W) in [−1, 1], C of PIXEL_CHANNELS → a picture of H × W pixels."""
    return picture_from_levels(levels_from_pixels(image))


def picture_from_levels(levels: NDArray[np.uint8]) -> Image.Image:
    """(H, W, C) in 0 … 255, C of PIXEL_CHANNELS → a picture of H × W pixels."""
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def png_from_picture(picture: Image.Image) -> bytes:
    """Return the PNG file's bytes: the same for the same picture, with no date or software in it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()
