"""The shared launches of a lane for every size that its requests have: only rows of one size go into a launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.runtime.batch_buckets import Buckets
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.shared_blocks import SharedBlocks

SIZES_KEPT: Final = 4  # whose buffers are kept beside the default's; a fifth takes the place of the longest unused
TRIALS_KEPT: Final = 256  # sizes whose buckets are remembered, a few numbers each; others are tried with their buffers
_DEFAULT_ROUNDS: Final = 5  # of timed launches, each over all buckets; the fastest of a bucket counts
_ROUNDS: Final = 1  # of another size: its first request, and all beside it in the lane, wait for the trial

Trials = dict[LatentSize | None, Buckets]  # by size, None is the default; one for all lanes of an engine


class BlocksBySize:
    """Makes the launches of a size when its first request comes, and tries its buckets unless a lane has done so."""

    def __init__(self, pipeline: Pipeline, sizes: Sequence[int], trials: Trials) -> None:
        """Make the launches of the model's default size, which is None.

        Args:
            pipeline: Held by the caller.
            sizes: Rows of a launch.
            trials: What the lanes found so far; they share it.

        Raises:
            RequestError: If a size is out of range, or the engines take none of them.
            EngineError: If there is no memory for the buffers.
        """
        self._pipeline = pipeline
        self._sizes = sizes
        self._trials = trials
        self._default = SharedBlocks(pipeline, sizes, None)
        self._others: OrderedDict[LatentSize, tuple[SharedBlocks, Buckets]] = OrderedDict()

    def of(self, latents: LatentSize | None) -> tuple[SharedBlocks, Buckets]:
        """Return the launches of a size and their buckets.

        Raises:
            EngineError: If there is no memory for the buffers, or a trial launch fails.
        """
        if latents is None:
            return self._default, self._buckets(self._default, latents)
        if latents not in self._others:
            while len(self._others) >= SIZES_KEPT:  # before the next allocation, so that they never add up
                self._others.popitem(last=False)
            blocks = SharedBlocks(self._pipeline, self._sizes, latents)
            self._others[latents] = blocks, self._buckets(blocks, latents)
        self._others.move_to_end(latents)
        return self._others[latents]

    def _buckets(self, blocks: SharedBlocks, latents: LatentSize | None) -> Buckets:
        if latents in self._trials:
            return self._trials[latents]
        buckets = blocks.tried(_DEFAULT_ROUNDS if latents is None else _ROUNDS)
        if len(self._trials) < TRIALS_KEPT:
            self._trials[latents] = buckets
        return buckets
