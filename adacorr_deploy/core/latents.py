"""The latents of a model: their axes, the sizes that a request may ask for, and how many tokens they become."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.core.shapes import FRAMES, SIZE_AXES, TOKENS, Dim

LatentSize = tuple[int, ...]  # (H, W) of an image's latents, or (F, H, W) of a clip's

MAX_LATENT_SIZE: Final = 65536  # along an axis: an untrusted manifest can't ask for more


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """What the latents of an image or a clip are, which sizes they may have, and how many tokens they become.

    Attributes:
        shape: (C, H, W) or (C, F, H, W) of a request that asks for no size.
        patch: Numbers along each axis but the channels that make a token: (p, p), or (1, p, p) of a clip.
        largest: For each of these axes, the most that a request may ask for, in multiples of the patch; empty where
            every request has the size of `shape`. An axis whose smallest and largest are that of `shape` can't vary.
        smallest: The least; empty: one patch.

    Raises:
        ValueError: If the sizes don't go together.
    """

    shape: tuple[int, int, int] | tuple[int, int, int, int]
    patch: tuple[int, int] | tuple[int, int, int]
    largest: tuple[int, ...] = ()
    smallest: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(*self.shape, *self.patch) < 1 or max(self.shape) > MAX_LATENT_SIZE:
            raise ValueError(f"shape and patch are {self.shape} and {self.patch}, allowed are 1 … {MAX_LATENT_SIZE}")
        axes = len(self.shape) - 1
        if len(self.patch) != axes or len(self.largest) not in (0, axes) or len(self.smallest) not in (0, axes):
            raise ValueError(f"shape, patch, smallest and largest are of other axes: {self}")
        if self.smallest and not self.largest:
            raise ValueError(f"smallest is {self.smallest} without largest")
        for (name, low, high), size, patch in zip(self.ranges, self.shape[1:], self.patch, strict=True):
            if not patch <= low <= size <= high <= MAX_LATENT_SIZE or any(each % patch for each in (low, size, high)):
                raise ValueError(
                    f"{name} goes from {low} to {high} and is {size} by default, allowed are multiples of the patch, "
                    f"{patch}, in order"
                )

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes after the channels: frames (of clips alone), height, width."""
        return SIZE_AXES[-(len(self.shape) - 1) :]

    @property
    def ranges(self) -> tuple[tuple[str, int, int], ...]:
        """Of each axis: its name, the smallest and the largest size."""
        smallest = self.smallest or (self.patch if self.largest else self.shape[1:])
        return tuple(zip(self.axes, smallest, self.largest or self.shape[1:], strict=True))

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the axes that requests may choose."""
        return tuple(name for name, low, high in self.ranges if low < high)

    @property
    def dims(self) -> tuple[Dim, ...]:
        """(C, H, W) or (C, F, H, W) as contracts write it: named where it varies."""
        varying = self.varying
        sizes = zip(self.axes, self.shape[1:], strict=True)
        return (self.shape[0], *(name if name in varying else size for name, size in sizes))

    @property
    def tokens_dim(self) -> Dim:
        """N as contracts write it."""
        return TOKENS if self.varying else self.tokens_at(None)

    def shape_at(self, size: LatentSize | None) -> tuple[int, ...]:
        """Return (C, H, W) or (C, F, H, W) of a request's size, (H, W) or (F, H, W); None is the default."""
        return self.shape if size is None else (self.shape[0], *size)

    def tokens_at(self, size: LatentSize | None) -> int:
        """Return N at a size."""
        sizes = zip(self.shape_at(size)[1:], self.patch, strict=True)
        return math.prod(length // patch for length, patch in sizes)

    def frames_at(self, size: LatentSize | None) -> int:
        """Return F of a clip at a size; 1 of an image."""
        return self.shape_at(size)[1] if FRAMES in self.axes else 1

    def sizes_at(self, size: LatentSize | None) -> dict[str, int]:
        """Return the size of every named axis that depends on it."""
        return {**dict(zip(self.axes, self.shape_at(size)[1:], strict=True)), TOKENS: self.tokens_at(size)}
