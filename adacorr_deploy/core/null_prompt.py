"""The prompt of images without condition, as a bundle keeps it: what a text encoder makes of an empty text.

The file is float32 embeddings (T, E), then a mask (T,) of int64, both little-endian and without a header: the manifest
says T and E, so its length can be checked, and nothing in it is parsed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.specs import PromptSpec

NULL_PROMPT_FILE: Final = "prompts/null.bin"
_EMBEDDING: Final = np.dtype("<f4")
_MASK: Final = np.dtype("<i8")


def null_prompt_bytes(spec: PromptSpec) -> int:
    """Return the length of the file."""
    return spec.tokens * (spec.width * _EMBEDDING.itemsize + _MASK.itemsize)


def content_of_null_prompt(embeddings: NDArray[np.float32], mask: NDArray[np.int64]) -> bytes:
    """Return the file of embeddings (T, E) and mask (T,)."""
    return embeddings.astype(_EMBEDDING).tobytes() + mask.astype(_MASK).tobytes()


def null_prompt_from_content(content: bytes, spec: PromptSpec) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return embeddings (T, E) and mask (T,) of a file.

    Raises:
        ValueError: If it is not of that length.
    """
    if len(content) != null_prompt_bytes(spec):
        raise ValueError(f"it holds {len(content)} bytes, a prompt of this model {null_prompt_bytes(spec)}")
    split = spec.tokens * spec.width * _EMBEDDING.itemsize
    embeddings = np.frombuffer(content[:split], _EMBEDDING).astype(np.float32)
    mask = np.frombuffer(content[split:], _MASK).astype(np.int64)
    return embeddings.reshape(spec.tokens, spec.width), mask
