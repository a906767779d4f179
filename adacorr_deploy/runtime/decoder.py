"""From latents to images and clips, tile by tile: memory is one tile's and the images', whatever the request."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError, SamplingCancelledError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.shapes import CHUNK, TILE_HEIGHT, TILE_WIDTH
from adacorr_deploy.core.specs import DecoderSpec
from adacorr_deploy.core.tiles import tile_starts, tile_weights
from adacorr_deploy.engines.backend import Backend, Launch, Session

Images = NDArray[np.float32]  # (B, C, H, W), or clips (B, F, C, H, W)
Plane = NDArray[np.float32]  # (H, W)
Corner = tuple[int, int]  # top left of a tile, in latent pixels


class Decoder:
    """The `decode` part of a bundle, over buffers bound once for each size of a tile."""

    def __init__(self, spec: DecoderSpec, session: Session, backend: Backend) -> None:
        self._spec = spec
        self._session = session
        self._backend = backend
        self._engine: _TileEngine | None = None

    def images(
        self, latents: Images, *, progress: Progress | None = None, cancelled: Callable[[], bool] | None = None
    ) -> Images:
        """Return images or clips in [−1, 1].

        Frames are decoded in chunks from a clip's first on, as many at once as the decoder's spec says; no chunk has
        frames of two clips.

        Args:
            latents: As a request leaves them: (B, C, H, W), or (B, C, F, H, W) of clips, of any size of the model's.
            progress: Told before each tile, and at the end.
            cancelled: Asked before each tile; True ends the decoding.

        Returns:
            (B, 3, s·H, s·W) or (B, F, 3, s·H, s·W).

        Raises:
            EngineError: If the engine fails, or an image is not finite.
            SamplingCancelledError: If `cancelled` returned True.
        """
        batch, _, *frames, height, width = latents.shape
        clips = latents.reshape(batch, -1, *(frames or [1]), height, width).swapaxes(1, 2)  # (B, F, C, H, W)
        engine, scale = self._engine_for(height, width), self._spec.scale
        images = np.zeros((*clips.shape[:2], self._spec.channels, scale * height, scale * width), dtype=np.float32)
        corners = list(engine.corners(height, width))
        total = np.zeros(images.shape[-2:], dtype=np.float32)
        for corner in corners:
            engine.part(total, corner)[...] += engine.weights
        tiles = list(itertools.product(range(batch), self._chunks(clips.shape[1]), corners))
        for image, chunk, corner in _watched(tiles, progress, cancelled):
            share = engine.weights / engine.part(total, corner)
            pixels = engine.part(images[image, chunk], corner)
            pixels += share * engine.decoded(clips[image, chunk], corner)
        if not np.isfinite(images).all():
            raise EngineError(
                "The decoded images hold NaN or infinite values. If this VAE overflows in half precision, build the "
                'bundle with --precision fp32, or set "force_upcast": true in the VAE\'s config.json and rebuild it.'
            )
        np.clip(images, -1.0, 1.0, out=images)
        return images if frames else images[:, 0]

    def _chunks(self, frames: int) -> Iterator[slice]:
        """Yield which frames of a clip are decoded at once: the last ones may be fewer, as in diffusers."""
        for first in range(0, frames, self._spec.frames):
            yield slice(first, min(first + self._spec.frames, frames))

    def _engine_for(self, height: int, width: int) -> _TileEngine:
        """Return the engine with buffers for tiles of latents of a size; those of the size before are given up."""
        tile = min(height, self._spec.tile[0]), min(width, self._spec.tile[1])
        if self._engine is None or self._engine.tile != tile:
            self._engine = None  # before the next allocation, so that they never add up
            self._engine = _TileEngine(self._spec, tile, self._session, self._backend)
        return self._engine


class _TileEngine:
    """Decodes tiles of one size, chunk by chunk."""

    def __init__(self, spec: DecoderSpec, tile: tuple[int, int], session: Session, backend: Backend) -> None:
        self.tile = tile
        self._spec = spec
        self._session = session
        (latents,), (pixels,) = session.spec.inputs, session.spec.outputs
        (height, width), scale = tile, spec.scale
        sizes = {CHUNK: spec.frames, TILE_HEIGHT: height, TILE_WIDTH: width}
        self._latents = backend.allocate(latents.resolved(sizes), latents.dtype)
        images = (self._latents.shape[0], spec.channels, scale * height, scale * width)
        self._pixels = backend.allocate(images, pixels.dtype)
        self._launches: dict[int, Launch] = {}  # by frames
        rows, columns = (tile_weights(scale * length, scale * spec.overlap) for length in tile)
        self.weights: Plane = rows[:, None] * columns  # how much a tile's pixels count

    def corners(self, height: int, width: int) -> Iterator[Corner]:
        """Yield the corners of the tiles that cover latents of a size."""
        lengths = zip((height, width), self.tile, strict=True)
        yield from itertools.product(*(tile_starts(length, tile, self._spec.overlap) for length, tile in lengths))

    def part(self, image: NDArray[np.float32], corner: Corner) -> NDArray[np.float32]:
        """Return the view of an image, (…, s·H, s·W), that a tile fills."""
        scale, (height, width), (top, left) = self._spec.scale, self.tile, corner
        return image[..., scale * top : scale * (top + height), scale * left : scale * (left + width)]

    def decoded(self, frames: NDArray[np.float32], corner: Corner) -> NDArray[np.float32]:
        """Run the engine on a tile of latents (f, C, H, W), and return its pixels, (f, 3, s·h, s·w)."""
        (height, width), (top, left), count = self.tile, corner, len(frames)
        self._latents[:count].write(np.ascontiguousarray(frames[..., top : top + height, left : left + width]))
        self._launch(count).run()
        return np.asarray(self._pixels[:count].read(), dtype=np.float32)

    def _launch(self, frames: int) -> Launch:
        """Return the engine bound to the first of the buffers' frames."""
        if frames not in self._launches:
            (latents,), (pixels,) = self._session.spec.inputs, self._session.spec.outputs
            bound = {latents.name: self._latents[:frames], pixels.name: self._pixels[:frames]}
            self._launches[frames] = self._session.bind(bound)
        return self._launches[frames]


def _watched(
    tiles: Sequence[tuple[int, slice, Corner]], progress: Progress | None, cancelled: Callable[[], bool] | None
) -> Iterator[tuple[int, slice, Corner]]:
    """Yield the tiles, telling of each, and of the end, unless the decoding is cancelled."""
    for done, tile in enumerate(tiles):
        if cancelled is not None and cancelled():
            raise SamplingCancelledError(f"Cancelled at tile {done + 1} of {len(tiles)}; nothing was kept.")
        if progress is not None:
            progress("decoding", done, len(tiles))
        yield tile
    if progress is not None:
        progress("decoding", len(tiles), len(tiles))
