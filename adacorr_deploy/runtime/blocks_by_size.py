"""The shared launches of a lane for every size that its requests have: only rows of one size go into a launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.runtime.batch_buckets import Buckets
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.shared_blocks import SharedBlocks

SIZES_KEPT: Final = 4  # whose buffers and trials are kept; a fifth takes the place of the longest unused


class BlocksBySize:
    """Makes the launches of a size, and tries its buckets, when its first request comes: that one waits for it."""

    def __init__(self, pipeline: Pipeline, sizes: Sequence[int]) -> None:
        """Make the launches of the model's default size; they are not tried yet.

        Args:
            pipeline: Held by the caller.
            sizes: Rows of a launch.

        Raises:
            RequestError: If a size is out of range, or the engines take none of them.
            EngineError: If there is no memory for the buffers.
        """
        self._pipeline = pipeline
        self._sizes = sizes
        self._default = SharedBlocks(pipeline, sizes, None)
        self._buckets: Buckets | None = None
        self._others: OrderedDict[LatentSize, tuple[SharedBlocks, Buckets]] = OrderedDict()

    def tried(self) -> Buckets:
        """Try the buckets at the default size; errors as `SharedBlocks.tried`."""
        self._buckets = self._default.tried()
        return self._buckets

    def take(self, buckets: Buckets) -> None:
        """Use what another lane's trial found at the default size."""
        self._buckets = buckets

    def of(self, latents: LatentSize | None) -> tuple[SharedBlocks, Buckets]:
        """Return the launches of a size and their buckets.

        Raises:
            EngineError: If there is no memory for the buffers, or a trial launch fails.
        """
        if latents is None:
            if self._buckets is None:
                raise AssertionError("the buckets of the default size were not tried")
            return self._default, self._buckets
        if latents not in self._others:
            while len(self._others) >= SIZES_KEPT:  # before the next allocation, so that they never add up
                self._others.popitem(last=False)
            blocks = SharedBlocks(self._pipeline, self._sizes, latents)
            self._others[latents] = blocks, blocks.tried()
        self._others.move_to_end(latents)
        return self._others[latents]
