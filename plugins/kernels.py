"""The CUDA kernels of plugins/cuda as a table: their names, arguments and grids, from the shapes of a part's tensors.

Pure Python, nothing of CUDA: a server needs this table, the PTX that a build left (`kernel_compiler.py`) and a driver.
A kernel's arguments are in the order of TensorRT's ahead-of-time plugins: the inputs' addresses, its sizes as 32-bit
integers, the outputs' addresses; then a scratch's, where it has one. They take any shape; where an address is not
16-byte aligned, or the width no whole number of 16 bytes, they go element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.shapes import BATCH
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec, TensorSpec
from adacorr_deploy.plugins.service_parts import OUTPUT_ERROR_PART, SIGNALS_PART

Shapes = Mapping[str, tuple[int, ...]]  # of a part's inputs and outputs, by name

ELEMENT_BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}  # what tokens may be made of
NOISE_KERNEL: Final = "philox_normal"

_VECTOR_BYTES: Final = 16
_MOST_ROWS: Final = 65535  # CUDA's largest grid height
_LARGEST_ROW: Final = 2**30 - 2**20  # elements; an index plus the grid's whole stride must stay below 2³¹
TOKENS_OF_A_THREAD: Final = 2  # update.cu's TOKENS
TOKEN_STATISTICS: Final = 8  # floats: signals.cu's TokenStatistics
_NORMALS_OF_A_THREAD: Final = 4  # a Philox counter's


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """An integer argument: the product of some axes of a tensor, or of all but the first."""

    tensor: str
    axes: tuple[int, ...] | None

    def of(self, shapes: Shapes) -> int:
        """Return its value."""
        shape = shapes[self.tensor]
        return math.prod(shape[1:] if self.axes is None else (shape[axis] for axis in self.axes))


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """A kernel. Its grid is always (blocks of a row, rows, 1); all its shared memory is static.

    Attributes:
        name: Also the stem of the service parts that it computes.
        typed: Whether there is one per element type of the tokens; else its tensors are float32.
        inputs: Tensors of the part, in the order of the arguments.
        sizes: Integer arguments, in order.
        outputs: Tensors of the part, in the order of the arguments.
        rows: The tensor whose first axis is the grid's height: rows or images, computed independently.
        blocks_of_row: The grid's width, from the values of `sizes` and the elements in 16 bytes.
        threads: Of a block.
        scratch: Shape of the last argument, float32, from the rows and the values of `sizes`, or None. It must be zero
            before its first launch; a launch leaves it fit for the next one of the same shape, on the same stream.
    """

    name: str
    typed: bool
    inputs: tuple[str, ...]
    sizes: tuple[Size, ...]
    outputs: tuple[str, ...]
    rows: str
    blocks_of_row: Callable[[tuple[int, ...], int], int]
    threads: int
    scratch: Callable[[int, tuple[int, ...]], tuple[int, ...]] | None = None

    def entry(self, precision: str) -> str:
        """Return the kernel's name in the PTX for tokens of `precision` (a `DType`, or a key of ELEMENT_BYTES).

        Raises:
            EngineError: If there is none.
        """
        if precision not in ELEMENT_BYTES:
            raise EngineError(
                f"There is no kernel {self.name} for {precision!r} tokens; there are {', '.join(ELEMENT_BYTES)}. "
                "Build the bundle in one of those."
            )
        element = next(name for name in ELEMENT_BYTES if name == precision)  # an enum member would print as itself
        return f"adacorr_{self.name}_{element}" if self.typed else f"adacorr_{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelLaunch:
    """All that a launch needs but the addresses: inputs, then `integers` (int32), then outputs, then the scratch."""

    entry: str
    inputs: tuple[str, ...]
    integers: tuple[int, ...]
    outputs: tuple[str, ...]
    scratch: tuple[int, ...] | None  # shape; float32, zeros before the first launch
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0


def kernel_launch(kernel: KernelSpec, precision: str, shapes: Shapes) -> KernelLaunch:
    """Return how a kernel is launched over tensors of these shapes.

    Args:
        kernel: One of `KERNELS`.
        precision: Of the tokens; ignored but for the name check by kernels that aren't typed.
        shapes: Of the part's inputs and outputs.

    Raises:
        EngineError: If there is no kernel for the precision, or the shapes are beyond what a grid can take.
    """
    entry = kernel.entry(precision)
    sizes = tuple(size.of(shapes) for size in kernel.sizes)
    rows, *of_row = shapes[kernel.rows]
    row_elements = math.prod(of_row)
    if not 1 <= rows <= _MOST_ROWS or not 1 <= row_elements <= _LARGEST_ROW:
        raise EngineError(
            f"{entry}: {rows} rows of {row_elements} elements; allowed are 1 … {_MOST_ROWS} rows of 1 … "
            f"{_LARGEST_ROW}. Take a smaller batch."
        )
    vector = _VECTOR_BYTES // ELEMENT_BYTES[precision] if kernel.typed else 1
    return KernelLaunch(
        entry=entry,
        inputs=kernel.inputs,
        integers=sizes,
        outputs=kernel.outputs,
        scratch=None if kernel.scratch is None else kernel.scratch(rows, sizes),
        grid=(kernel.blocks_of_row(sizes, vector), rows, 1),
        block=(kernel.threads, 1, 1),
    )


def kernel_of_part(part: str) -> KernelSpec | None:
    """Return the kernel that computes a service part (`predict_2_u8`), or None for a part that needs an engine."""
    return KERNELS.get(part) or KERNELS.get(part.partition("_")[0])


def noise_spec(model: ModelSpec) -> PartSpec:
    """Return the noise kernel as a part that any model may launch: no bundle holds it.

    In go `keys` (B, 2), each image's seed and number as the bits of unsigned integers, and `draw` (1,), how many draws
    came before; out comes `noise` (B, C, H, W): `oracle.philox_normals`.
    """
    return PartSpec(
        name=NOISE_KERNEL,
        inputs=(
            TensorSpec(name="keys", dtype=DType.INT64, shape=(BATCH, 2)),
            TensorSpec(name="draw", dtype=DType.INT64, shape=(1,)),
        ),
        outputs=(TensorSpec(name="noise", dtype=DType.FLOAT32, shape=(BATCH, *model.latents.dims)),),
    )


def _blocks(items: int, per_block: int) -> int:
    return -(-items // per_block)


def _update_blocks(sizes: tuple[int, ...], vector: int) -> int:
    tokens, width = sizes[:2]
    vectors = width // vector if width % vector == 0 else width
    return _blocks(vectors * _blocks(tokens, TOKENS_OF_A_THREAD), 128)


_TOKEN_COUNT: Final = 1
_WIDTH: Final = 2
_HISTORY_SIZES: Final = (Size(tensor="history", axes=(0,)), Size(tensor="history", axes=(1,)))  # T, U
_SLOT_INPUTS: Final = ("history", "modulation", "gate_steps", "coefficients")
_MODULATED_INPUTS: Final = ("tokens", "modulation", "step")
_MODULATION_ROWS: Final = Size(tensor="modulation", axes=(2,))


def _token_sizes(tensor: str) -> tuple[Size, Size]:
    return Size(tensor=tensor, axes=(_TOKEN_COUNT,)), Size(tensor=tensor, axes=(_WIDTH,))


def _elements(tensor: str) -> Size:
    return Size(tensor=tensor, axes=None)


_TOKENS_OF_A_BLOCK: Final = 8  # of 256 threads: a warp takes a token

_SPECS: Final = (
    KernelSpec(
        name=SIGNALS_PART,
        typed=True,
        inputs=("tokens", "reference"),
        sizes=_token_sizes("tokens"),
        outputs=("signals",),
        rows="tokens",
        blocks_of_row=lambda sizes, _: _blocks(sizes[0], _TOKENS_OF_A_BLOCK),
        threads=256,
        scratch=lambda rows, sizes: (rows, sizes[0] + 1, TOKEN_STATISTICS),
    ),
    KernelSpec(
        name="predict",
        typed=True,
        inputs=("tokens", *_SLOT_INPUTS),
        sizes=(*_token_sizes("tokens"), *_HISTORY_SIZES),
        outputs=("tokens_out",),
        rows="tokens",
        blocks_of_row=_update_blocks,
        threads=128,
    ),
    KernelSpec(
        name="blend",
        typed=True,
        inputs=("base", *_SLOT_INPUTS, "fresh", "estimate", "thresholds"),
        sizes=(*_token_sizes("base"), *_HISTORY_SIZES),
        outputs=("tokens_out", "weight"),
        rows="base",
        blocks_of_row=_update_blocks,
        threads=128,
    ),
    KernelSpec(
        name="combine",
        typed=True,
        inputs=("base", "history", "coefficients", "scale", "shift"),
        sizes=(*_token_sizes("base"), Size(tensor="history", axes=(0,))),
        outputs=("tokens_out",),
        rows="base",
        blocks_of_row=_update_blocks,
        threads=128,
    ),
    KernelSpec(
        name="modulated",
        typed=True,
        inputs=_MODULATED_INPUTS,
        sizes=(*_token_sizes("tokens"), _MODULATION_ROWS),
        outputs=("tokens_out",),
        rows="tokens",
        blocks_of_row=lambda sizes, _: _blocks(sizes[0], _TOKENS_OF_A_BLOCK),
        threads=256,
    ),
    KernelSpec(
        name="probe",
        typed=True,
        inputs=(*_MODULATED_INPUTS, "weights", "bias"),
        sizes=(*_token_sizes("tokens"), _MODULATION_ROWS),
        outputs=("probe",),
        rows="tokens",
        blocks_of_row=lambda sizes, _: 1,
        threads=512,
    ),
    KernelSpec(
        name="extrapolate",
        typed=False,
        inputs=("latents", "history", "factors", "step", "coefficients", "noise", "carried"),
        sizes=(_elements("latents"), Size(tensor="history", axes=(0,))),
        outputs=("latents_out", "model_output", "carried_out"),
        rows="latents",
        blocks_of_row=lambda sizes, _: _blocks(sizes[0], 256),
        threads=256,
    ),
    KernelSpec(
        name=OUTPUT_ERROR_PART,
        typed=False,
        inputs=("predicted", "fresh"),
        sizes=(_elements("predicted"),),
        outputs=("error",),
        rows="predicted",
        blocks_of_row=lambda sizes, _: 1,
        threads=512,
    ),
    KernelSpec(
        name=NOISE_KERNEL,
        typed=False,
        inputs=("keys", "draw"),
        sizes=(_elements("noise"),),
        outputs=("noise",),
        rows="noise",
        blocks_of_row=lambda sizes, _: _blocks(_blocks(sizes[0], _NORMALS_OF_A_THREAD), 128),
        threads=128,
    ),
)
KERNELS: Final[Mapping[str, KernelSpec]] = {spec.name: spec for spec in _SPECS}
