"""The launches of a size are made when they are asked for, kept for a few sizes, and tried once for all lanes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.runtime import blocks_by_size
from adacorr_deploy.runtime.batch_buckets import Buckets
from adacorr_deploy.runtime.blocks_by_size import SIZES_KEPT, BlocksBySize, Trials

MADE: list[LatentSize | None] = []
TRIED: list[tuple[LatentSize | None, int]] = []


class CountedBlocks:
    """Stands for `SharedBlocks`, and says when one is made and tried."""

    def __init__(self, pipeline: object, sizes: Sequence[int], latents: LatentSize | None) -> None:
        self.latents = latents
        MADE.append(latents)

    def tried(self, times: int) -> Buckets:
        TRIED.append((self.latents, times))
        return Buckets(seconds={2: float(len(TRIED))}, identical=True)


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[BlocksBySize]:
    MADE.clear()
    TRIED.clear()
    monkeypatch.setattr(blocks_by_size, "SharedBlocks", CountedBlocks)
    trials = Trials()
    return [BlocksBySize(None, (2,), trials) for _ in range(2)]  # type: ignore[arg-type]


def test_a_size_is_tried_once_for_all_lanes(lanes: list[BlocksBySize]) -> None:
    for size in (None, (4, 8), None, (4, 8)):
        (first, buckets), (second, same) = (lane.of(size) for lane in lanes)
        assert buckets is same
        assert first is not second  # each lane has buffers of its own
    assert [size for size, _ in TRIED] == [None, (4, 8)]
    assert TRIED[1][1] < TRIED[0][1]  # requests wait for a trial that comes later


def test_buffers_are_given_up_and_what_was_tried_is_not(lanes: list[BlocksBySize]) -> None:
    lane = lanes[0]
    sizes: list[LatentSize] = [(2, 2 + 2 * index) for index in range(SIZES_KEPT + 1)]
    for size in (None, *sizes, sizes[0], None):
        blocks, _ = lane.of(size)
        assert blocks.latents == size  # type: ignore[attr-defined]
    assert MADE.count(sizes[0]) == 2
    assert MADE.count(sizes[1]) == 1
    assert MADE.count(None) == len(lanes)
    assert [size for size, _ in TRIED] == [None, *sizes]
