"""What goes into and comes out of a part: names, element types and shapes with named dynamic axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

Dim = int | str  # a size, or the name of a dynamic axis

DECODE_PART: Final = "decode"
MAX_PROMPT_SIZE: Final = 65536  # an untrusted manifest can't ask for more
MAX_DECODER_SIZE: Final = 4096  # of a tile or a scale: an untrusted manifest can't ask for more
UNITS_OF_BLOCK: Final = ("attention", "mlp")  # what a transformer block adds to its tokens, in order
BLOCK_UNITS: Final = len(UNITS_OF_BLOCK)
MODULATIONS_PER_UNIT: Final = 3  # shift and scale of its input, gate of its result
SHIFT_ROW, SCALE_ROW, GATE_ROW = range(MODULATIONS_PER_UNIT)  # where they stand among a unit's rows of modulation


class DType(str, Enum):
    """Element type of a tensor; the value is NumPy's name for it."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT64 = "int64"

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """NumPy's type; it has no bfloat16 of its own, so that one is ml_dtypes'."""
        if self is DType.BFLOAT16:
            import ml_dtypes

            bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        name: str = self.value
        return np.dtype(name)

    @classmethod
    def from_numpy(cls, dtype: DTypeLike) -> DType:
        return cls(np.dtype(dtype).name)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One input or output of a part."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def resolved(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with every named axis replaced by its size.

        Raises:
            KeyError: If `sizes` lacks a named axis (a bug of the caller, never of a user).
        """
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSpec:
    """One part: embed, condition, block_00…, head, or a service part of the runtime (signals, predict_…, combine_…)."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """What a text encoder gives a model: T tokens of width E, padded, with a mask that says which are real.

    Raises:
        ValueError: If a size is out of range.
    """

    tokens: int
    width: int

    def __post_init__(self) -> None:
        if not (1 <= self.tokens <= MAX_PROMPT_SIZE and 1 <= self.width <= MAX_PROMPT_SIZE):
            raise ValueError(f"a prompt of {self.tokens} × {self.width}, allowed are 1 … {MAX_PROMPT_SIZE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the runtime must know of an exported model, whatever its family."""

    family: str  # key of the exporter's table, e.g. "dit"
    precision: DType  # of weights and activations between parts
    latent_shape: tuple[int, int, int]  # (C, H, W)
    tokens: int  # N
    width: int  # D
    num_classes: int  # labels 0 … num_classes − 1; the null label of guidance is num_classes
    units: tuple[int, ...]  # in each block part: (2, 2, …), (1, 1, …) with halves, (8, 8, 8) with segments of 4 blocks
    learned_variance: bool
    norm_epsilon: float = 1e-6  # of the norm before a block's attention

    @property
    def halves(self) -> bool:
        """Whether each transformer block is two parts: attention and MLP."""
        return all(units == 1 for units in self.units)

    @property
    def block_names(self) -> tuple[str, ...]:
        """The block parts: `block_00`, …, or `block_00_attention`, `block_00_mlp`, …."""
        if not self.halves:
            return tuple(f"block_{index:02d}" for index in range(len(self.units)))
        halves = (divmod(index, BLOCK_UNITS) for index in range(len(self.units)))
        return tuple(f"block_{block:02d}_{UNITS_OF_BLOCK[unit]}" for block, unit in halves)

    def unit_names(self, part: int) -> tuple[str, ...]:
        """Return the outputs of a block part that slots keep, its units' results before their adaLN gates.

        `attention_0, mlp_0, attention_1, …` of whole blocks; `attention_0` or `mlp_0` of a half.
        """
        first = part % BLOCK_UNITS if self.halves else 0
        units = (divmod(index, BLOCK_UNITS) for index in range(first, first + self.units[part]))
        return tuple(f"{UNITS_OF_BLOCK[unit]}_{block}" for block, unit in units)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """How latents become images: what the `decode` part makes of a tile, and how tiles make an image.

    Raises:
        ValueError: If the sizes don't go together.
    """

    precision: DType  # of weights and activations inside
    tile: tuple[int, int]  # latent pixels decoded at once, (h, w)
    overlap: int  # latent pixels that neighbouring tiles share at least
    scale: int  # image pixels per latent pixel, along an axis
    channels: int  # of an image: 1 or 3
    vae_sha256: str  # of the VAE's weight files

    def __post_init__(self) -> None:
        sizes = (*self.tile, self.scale)
        if min(sizes) < 1 or max(sizes) > MAX_DECODER_SIZE or not self.overlap >= 0:
            raise ValueError(f"tile, overlap and scale are {self.tile}, {self.overlap} and {self.scale}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}, allowed are 1 and 3")


def decode_spec(model: ModelSpec, decoder: DecoderSpec) -> PartSpec:
    """Return the spec of `decode`: latents (1, C, h, w) in, images (1, 3, s·h, s·w) out, both float32."""
    height, width = decoder.tile
    pixels = (1, decoder.channels, decoder.scale * height, decoder.scale * width)
    return PartSpec(
        name=DECODE_PART,
        inputs=(TensorSpec(name="latents", dtype=DType.FLOAT32, shape=(1, model.latent_shape[0], height, width)),),
        outputs=(TensorSpec(name="images", dtype=DType.FLOAT32, shape=pixels),),
    )
