"""What goes into and comes out of a part: names, element types and shapes with named dynamic axes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.shapes import (
    CHUNK,
    FRAMES,
    IMAGE_OF_TILE,
    ROWS,
    SIZE_AXES,
    STEPS,
    TILE_HEIGHT,
    TILE_WIDTH,
    Dim,
)

DECODE_PART: Final = "decode"
MAX_PROMPT_SIZE: Final = 65536  # an untrusted manifest can't ask for more
MAX_WIDTH: Final = 65536  # nor for more of D
MAX_CLASSES: Final = 1 << 20  # nor for more of these
MAX_DECODER_SIZE: Final = 4096  # of a tile, a chunk or a scale: an untrusted manifest can't ask for more
HALVES: Final = 0  # as the transformer blocks in a block part: each of their units is a part of its own
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
    ranges: tuple[tuple[str, int, int], ...] = ()  # of named axes that are no request's batch or steps: least, most


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """What a text encoder gives a model: T tokens of width E, padded, with a mask that says which are real.

    Raises:
        ValueError: If a size is out of range.
    """

    tokens: int
    width: int
    shared_mask: bool = False  # rows without condition have the mask of their image's prompt, whatever their own is

    def __post_init__(self) -> None:
        if not (1 <= self.tokens <= MAX_PROMPT_SIZE and 1 <= self.width <= MAX_PROMPT_SIZE):
            raise ValueError(f"a prompt of {self.tokens} × {self.width}, allowed are 1 … {MAX_PROMPT_SIZE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionSpec:
    """What a request must say of its images.

    Raises:
        ValueError: If the number of classes is out of range.
    """

    num_classes: int = 0  # labels 0 … num_classes − 1; the null label of guidance is num_classes. 0: it takes no labels
    prompt: PromptSpec | None = None  # None: it takes no text
    frame_rate: bool = False  # whether it takes the frames per second of a clip

    def __post_init__(self) -> None:
        if not 0 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes is {self.num_classes}, allowed are 0 … {MAX_CLASSES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What the runtime must know of an exported model, whatever its family.

    Raises:
        ValueError: If the width is out of range, or `units` doesn't divide the blocks into whole ones, or into units.
    """

    family: str  # key of the exporter's table, e.g. "dit"
    precision: DType  # of weights and activations between parts
    latents: LatentSpec
    width: int  # D
    conditions: ConditionSpec
    blocks: tuple[tuple[str, ...], ...]  # names of each transformer block's units: (("attention", "mlp"), …)
    units: tuple[int, ...]  # in each block part: (2, 2, …), (1, 1, …) with halves, (8, 8, 8) with segments of 4 blocks
    learned_variance: bool
    norm_epsilon: float = 1e-6  # of the norm before a block's attention

    def __post_init__(self) -> None:
        if not 1 <= self.width <= MAX_WIDTH or not 0 < self.norm_epsilon <= 1:
            raise ValueError(
                f"width and norm_epsilon are {self.width} and {self.norm_epsilon}, allowed are 1 … {MAX_WIDTH} and "
                "more than 0, at most 1"
            )
        if not self.blocks or not all(self.blocks) or min(self.units, default=0) < 1:
            raise ValueError(f"there are units {self.units} of blocks {self.blocks}, allowed is no empty one")
        ends = set(itertools.accumulate(len(block) for block in self.blocks))
        parts = list(itertools.accumulate(self.units))
        if parts[-1] != max(ends) or not (self.halves or ends.issuperset(parts)):
            sizes = [len(block) for block in self.blocks]
            raise ValueError(
                f"units is {self.units}, allowed are sums of consecutive ones of {sizes}, for parts of whole blocks, "
                f"or 1 for each of {max(ends)} units"
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) or (C, F, H, W) of a request that asks for no other size."""
        return self.latents.shape

    @property
    def tokens(self) -> int:
        """N of a request that asks for no other size."""
        return self.latents.tokens_at(None)

    @property
    def num_classes(self) -> int:
        return self.conditions.num_classes

    @property
    def halves(self) -> bool:
        """Whether each unit of a transformer block is a part: of a DiT, its attention and its MLP."""
        return all(units == 1 for units in self.units)

    @property
    def segment(self) -> int:
        """Transformer blocks in a block part, the last may have fewer; `HALVES` if each unit is one."""
        if self.halves:
            return HALVES
        return 1 + list(itertools.accumulate(len(block) for block in self.blocks)).index(self.units[0])

    @property
    def block_names(self) -> tuple[str, ...]:
        """The block parts: `block_00`, …, or `block_00_attention`, `block_00_mlp`, …."""
        if not self.halves:
            return tuple(f"block_{index:02d}" for index in range(len(self.units)))
        return tuple(f"block_{block:02d}_{unit}" for block, unit in self._all_units())

    def unit_names(self, part: int) -> tuple[str, ...]:
        """Return the outputs of a block part that slots keep, its units' results before their gates.

        `attention_0, mlp_0, attention_1, …` of whole blocks; `attention_0` or `mlp_0` of a half.
        """
        first = sum(self.units[:part])
        units = self._all_units()[first : first + self.units[part]]
        return tuple(f"{unit}_{block - units[0][0]}" for block, unit in units)

    def _all_units(self) -> list[tuple[int, str]]:
        return [(index, unit) for index, block in enumerate(self.blocks) for unit in block]


def units_of_parts(blocks: Sequence[Sequence[str]], segment: int) -> tuple[int, ...]:
    """Return the number of units in each block part, if so many transformer blocks make one (or `HALVES`).

    Only the last part may have fewer blocks.

    Raises:
        ValueError: If the segment is negative.
    """
    if segment < 0:
        raise ValueError(f"a block part holds whole blocks, or one unit ({HALVES}); got a segment of {segment}")
    sizes = [len(block) for block in blocks]
    if segment == HALVES:
        return (1,) * sum(sizes)
    return tuple(sum(sizes[first : first + segment]) for first in range(0, len(sizes), segment))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """How latents become images: what the `decode` part makes of a tile, and how tiles make an image or a clip.

    Raises:
        ValueError: If the sizes don't go together.
    """

    precision: DType  # of weights and activations inside
    tile: tuple[int, int]  # latent pixels decoded at once, (h, w); of smaller latents, all
    overlap: int  # latent pixels that neighbouring tiles share at least
    scale: int  # image pixels per latent pixel, along an axis
    channels: int  # of an image: 1 or 3
    vae_sha256: str  # of the VAE's weight files
    frames: int = 1  # of a clip, decoded at once: a chunk, of which the last one may have fewer

    def __post_init__(self) -> None:
        sizes = (*self.tile, self.scale, self.frames)
        if min(sizes) < 1 or max(sizes) > MAX_DECODER_SIZE or not self.overlap >= 0:
            raise ValueError(
                f"tile, overlap, scale and frames are {self.tile}, {self.overlap}, {self.scale} and {self.frames}"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}, allowed are 1 and 3")


def decode_spec(model: ModelSpec, decoder: DecoderSpec) -> PartSpec:
    """Return the spec of `decode`: latents (f, C, h, w) in, images (f, 3, s·h, s·w) out, both float32.

    f is 1, or the axis `CHUNK` where several frames of a clip are decoded at once. h and w are the tile's, or axes
    where latents may be smaller than it.
    """
    (_, smallest_height, _), (_, smallest_width, _) = model.latents.ranges[-2:]
    height, width = decoder.tile
    ranges = ((CHUNK, 1, decoder.frames), (TILE_HEIGHT, smallest_height, height), (TILE_WIDTH, smallest_width, width))
    varying = tuple(each for each in ranges if each[1] < each[2])
    frames, *tile = (name if least < most else most for name, least, most in ranges)
    scale = decoder.scale
    image = [IMAGE_OF_TILE[dim] if isinstance(dim, str) else scale * dim for dim in tile]
    enlarged = (
        (IMAGE_OF_TILE[name], scale * least, scale * most) for name, least, most in varying if name in IMAGE_OF_TILE
    )
    latents, images = (frames, model.latent_shape[0], *tile), (frames, decoder.channels, *image)
    return PartSpec(
        name=DECODE_PART,
        inputs=(TensorSpec(name="latents", dtype=DType.FLOAT32, shape=latents),),
        outputs=(TensorSpec(name="images", dtype=DType.FLOAT32, shape=images),),
        ranges=(*varying, *enlarged),
    )


def request_tensors(model: ModelSpec) -> dict[str, TensorSpec]:
    """Return what the runtime knows of a request, by name: a part that has an input of such a name is given it.

    `timesteps` (S,) · `labels` (R,) · `prompt_embeddings` (R, T, E) and `prompt_mask` (R, T), 1 where a token is real ·
    `frame_rate` (R,) · `frame_positions` (F,), 0 … F − 1, whose length gives a block the number of frames ·
    `latent_size` (3,): frames (1 of an image), height and width of the latents.
    """
    f32, i64 = DType.FLOAT32, DType.INT64
    specs = [
        TensorSpec(name="timesteps", dtype=f32, shape=(STEPS,)),
        TensorSpec(name="latent_size", dtype=f32, shape=(len(SIZE_AXES),)),
    ]
    if model.num_classes:
        specs.append(TensorSpec(name="labels", dtype=i64, shape=(ROWS,)))
    if (prompt := model.conditions.prompt) is not None:
        specs.append(TensorSpec(name="prompt_embeddings", dtype=f32, shape=(ROWS, prompt.tokens, prompt.width)))
        specs.append(TensorSpec(name="prompt_mask", dtype=i64, shape=(ROWS, prompt.tokens)))
    if model.conditions.frame_rate:
        specs.append(TensorSpec(name="frame_rate", dtype=f32, shape=(ROWS,)))
    if FRAMES in model.latents.axes:
        specs.append(TensorSpec(name="frame_positions", dtype=f32, shape=(model.latents.dims[1],)))
    return {spec.name: spec for spec in specs}
