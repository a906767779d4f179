"""From latents to images, tile by tile: memory is one tile's and the images', whatever the request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError, SamplingCancelledError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.specs import DecoderSpec
from adacorr_deploy.core.tiles import tile_starts, tile_weights
from adacorr_deploy.engines.backend import Backend, Session

Images = NDArray[np.float32]  # (B, C, H, W)
Plane = NDArray[np.float32]  # (H, W)


class Decoder:
    """The `decode` part of a bundle, over buffers bound once."""

    def __init__(self, spec: DecoderSpec, session: Session, backend: Backend) -> None:
        self._spec = spec
        (latents,), (pixels,) = session.spec.inputs, session.spec.outputs
        self._latents = backend.allocate(latents.resolved({}), latents.dtype)
        self._pixels = backend.allocate(pixels.resolved({}), pixels.dtype)
        self._launch = session.bind({latents.name: self._latents, pixels.name: self._pixels})

    def images(
        self, latents: Images, *, progress: Progress | None = None, cancelled: Callable[[], bool] | None = None
    ) -> Images:
        """Return images, (B, 3, s·H, s·W) in [−1, 1], of latents (B, C, H, W).

        Args:
            latents: As a request leaves them; H and W are the model's.
            progress: Told before each tile, and at the end.
            cancelled: Asked before each tile; True ends the decoding.

        Raises:
            EngineError: If the engine fails, or an image is not finite.
            SamplingCancelledError: If `cancelled` returned True.
        """
        batch, _, *size = latents.shape
        height, width = (self._spec.scale * length for length in size)
        images = np.zeros((batch, self._spec.channels, height, width), dtype=np.float32)
        tiles = list(self._tiles(*size))
        weights, shares = self._weights(), np.zeros((height, width), dtype=np.float32)
        for top, left in tiles:
            self._part(shares, top, left)[...] += weights
        for done, (image, (top, left)) in enumerate(itertools.product(range(batch), tiles)):
            if cancelled is not None and cancelled():
                raise SamplingCancelledError(f"Cancelled at tile {done + 1} of {batch * len(tiles)}; nothing was kept.")
            if progress is not None:
                progress("decoding", done, batch * len(tiles))
            share = weights / self._part(shares, top, left)
            self._part(images[image], top, left)[...] += share * self._pixels_of_tile(latents[image], top, left)
        if progress is not None:
            progress("decoding", batch * len(tiles), batch * len(tiles))
        if not np.isfinite(images).all():
            raise EngineError(
                "The decoded images hold NaN or infinite values. If this VAE overflows in half precision, build the "
                'bundle with --precision fp32, or set "force_upcast": true in the VAE\'s config.json and rebuild it.'
            )
        return np.clip(images, -1.0, 1.0, out=images)

    def _tiles(self, height: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield the top left corners of the tiles, in latent pixels."""
        lengths = zip((height, width), self._spec.tile, strict=True)
        yield from itertools.product(*(tile_starts(length, tile, self._spec.overlap) for length, tile in lengths))

    def _weights(self) -> Plane:
        """Return how much a tile's pixels count, (s·h, s·w)."""
        scale = self._spec.scale
        rows, columns = (tile_weights(scale * tile, scale * self._spec.overlap) for tile in self._spec.tile)
        return rows[:, None] * columns

    def _part(self, image: NDArray[np.float32], top: int, left: int) -> NDArray[np.float32]:
        """Return the view of an image, (…, s·H, s·W), that a tile fills."""
        scale, (height, width) = self._spec.scale, self._spec.tile
        return image[..., scale * top : scale * (top + height), scale * left : scale * (left + width)]

    def _pixels_of_tile(self, latents: NDArray[np.float32], top: int, left: int) -> NDArray[np.float32]:
        """Run the engine on a tile of latents (C, H, W), and return its pixels, (3, s·h, s·w)."""
        height, width = self._spec.tile
        self._latents.write(np.ascontiguousarray(latents[None, :, top : top + height, left : left + width]))
        self._launch.run()
        return np.asarray(self._pixels.read()[0], dtype=np.float32)
