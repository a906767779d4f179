"""Sizes of the random models that benchmarks run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from adacorr_deploy.core.errors import AdaCorrError

# Width, blocks, heads and latent side of the sizes of arXiv 2212.09748, and of one to try this script with.
SHAPES: Final[Mapping[str, tuple[int, int, int, int]]] = {
    "S": (384, 12, 6, 32),
    "B": (768, 12, 12, 32),
    "L": (1024, 24, 16, 32),
    "XL": (1152, 28, 16, 32),
    "tiny": (32, 3, 2, 8),
}


def shape_and_patch(size: str) -> tuple[tuple[int, int, int, int], int]:
    """Return what a size such as `S/2` stands for.

    Raises:
        AdaCorrError: If it is not known.
    """
    name, _, patch = size.partition("/")
    if name not in SHAPES or patch not in ("", "2", "4", "8"):
        raise AdaCorrError(f"size {size!r} is not known. Allowed are {', '.join(SHAPES)} with /2, /4 or /8.")
    return SHAPES[name], int(patch or 2)
