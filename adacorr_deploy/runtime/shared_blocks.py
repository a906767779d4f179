"""Block launches over the rows of many requests: rows are copied together, the engine runs once, rows are copied back.

Blocks know nothing of requests, steps or guidance: a row is N tokens, its own step's modulation, and its context. So
rows of any requests of one size go into one launch; each row's modulation is copied out of its request's table into a
table of one step.
Where copies are queued on a GPU's stream, they are in order with the launches.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.core.shapes import ROWS, STEPS, TOKENS
from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT, DType, TensorSpec
from adacorr_deploy.engines.backend import Buffer, Launch
from adacorr_deploy.runtime.batch_buckets import MAX_BUCKET_ROWS, Buckets, BucketTrial, agreeing_buckets
from adacorr_deploy.runtime.denoise import BlockWork
from adacorr_deploy.runtime.pipeline import Pipeline
from adacorr_deploy.runtime.request import check_integer

_OWN_INPUTS: Final = frozenset({"tokens", "modulation", "step"})  # of a block part


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Some of a request's rows in a launch."""

    work: BlockWork
    first: int  # of the request's R rows
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowBuffers:
    """What every launch reads and writes; a smaller bucket takes the first rows."""

    tokens: Buffer  # (R, N, D)
    tokens_out: Buffer  # (R, N, D)
    units: tuple[Buffer, ...]  # (R, N, D) each, as many as the largest part has
    step: Buffer  # (1,) int64, always 0
    named: Mapping[str, Buffer]  # what parts take by name: (R, …) the context, others as they are


class SharedBlocks:
    """The block parts of a pipeline, bound to buffers of their own for every bucket."""

    def __init__(self, pipeline: Pipeline, sizes: Sequence[int], latents: LatentSize | None) -> None:
        """Allocate the buffers.

        Args:
            pipeline: Held by the caller.
            latents: The size of the rows; None is the model's default.
            sizes: Rows of a launch, 1 … 4096 each; those that the engines were not compiled for are left out.

        Raises:
            RequestError: If a size is out of range, or the engines take none of them.
            EngineError: If there is no memory for the buffers.
        """
        self._pipeline = pipeline
        self._model = pipeline.manifest.model
        self._lengths = self._model.latents.sizes_at(latents)
        self._launches: dict[tuple[int, int], Launch] = {}
        axes = pipeline.compiled_axes
        self._sizes = sizes = _launchable(sizes, axes[ROWS] if axes is not None else None)
        self._table_steps = axes[STEPS][0] if axes is not None else 1
        self._buffers = self._allocate(max(sizes))
        self._modulation = {  # by rows, and by units of a part: (1, R, 3U, D)
            (rows, units): self._allocate_modulation(rows, units) for rows in sizes for units in {*self._model.units}
        }

    def run(self, block: int, seats: Sequence[Seat], *, bucket: int) -> None:
        """Evaluate a block for the rows of all seats, at most `bucket`, in one launch.

        Raises:
            EngineError: If the engine fails; no seat then holds anything new that its request would read.
        """
        modulation = self._modulation[bucket, self._model.units[block]][0]
        for place, seat in _placed(seats):
            _part(self._buffers.tokens, place).copy_from(_part(seat.work.space.block_input(block), _rows(seat)))
            table = seat.work.space.blocks.modulation[block][seat.work.step]
            _part(modulation, place).copy_from(_part(table, _rows(seat)))
        self._gather(block, seats)
        self._launch(block, bucket).run()
        for place, seat in _placed(seats):
            self._give_back(block, seat, place)

    def _gather(self, block: int, seats: Sequence[Seat]) -> None:
        """Copy together what the part takes by name; what is not of rows is the same for all of one size."""
        for tensor in self._named_inputs(block):
            buffer = self._buffers.named[tensor.name]
            if tensor.shape[0] != ROWS:
                buffer.copy_from(seats[0].work.space.named[tensor.name])
                continue
            for place, seat in _placed(seats):
                _part(buffer, place).copy_from(_part(seat.work.space.named[tensor.name], _rows(seat)))

    def _named_inputs(self, block: int) -> list[TensorSpec]:
        spec = self._pipeline.session(self._model.block_names[block]).spec
        return [tensor for tensor in spec.inputs if tensor.name not in _OWN_INPUTS]

    def _give_back(self, block: int, seat: Seat, place: slice) -> None:
        work, rows = seat.work, _rows(seat)
        output = work.space.blocks.fresh if work.aside else work.space.block_output(block)
        _part(output, rows).copy_from(_part(self._buffers.tokens_out, place))
        slot = work.slots[block - work.first]
        if slot.history.capacity:  # in a run that keeps no units, nobody reads them
            entry = slot.ring[slot.next_entry]
            for unit in range(entry.shape[0]):
                _part(entry[unit], rows).copy_from(_part(self._buffers.units[unit], place))

    # --- Buffers and launches ------------------------------------------------------------------------------------

    def _allocate(self, rows: int) -> _RowBuffers:
        model, backend = self._model, self._pipeline.backend
        tokens = (rows, self._lengths[TOKENS], model.width)
        named = {each.name: each for block in range(len(model.units)) for each in self._named_inputs(block)}
        sizes = {**self._lengths, ROWS: rows}
        return _RowBuffers(
            tokens=backend.allocate(tokens, model.precision),
            tokens_out=backend.allocate(tokens, model.precision),
            units=tuple(backend.allocate(tokens, model.precision) for _ in range(max(model.units))),
            step=backend.allocate((1,), DType.INT64),
            named={name: backend.allocate(each.resolved(sizes), each.dtype) for name, each in named.items()},
        )

    def _allocate_modulation(self, rows: int, units: int) -> Buffer:
        shape = (self._table_steps, rows, MODULATIONS_PER_UNIT * units, self._model.width)
        return self._pipeline.backend.allocate(shape, self._model.precision)

    def _launch(self, block: int, bucket: int) -> Launch:
        launch = self._launches.get((block, bucket))
        if launch is None:
            buffers, rows = self._buffers, slice(0, bucket)
            units = zip(self._model.unit_names(block), buffers.units, strict=False)
            launch = self._launches[block, bucket] = self._pipeline.session(self._model.block_names[block]).bind(
                {
                    "tokens": _part(buffers.tokens, rows),
                    "modulation": self._modulation[bucket, self._model.units[block]],
                    "step": buffers.step,
                    "tokens_out": _part(buffers.tokens_out, rows),
                    **{name: _part(unit, rows) for name, unit in units},
                    **{
                        each.name: _part(buffers.named[each.name], rows)
                        if each.shape[0] == ROWS
                        else buffers.named[each.name]
                        for each in self._named_inputs(block)
                    },
                }
            )
        return launch

    # --- Trials --------------------------------------------------------------------------------------------------

    def tried(self, times: int) -> Buckets:
        """Launch one block of each structure with every bucket, its rows all the same, and compare what comes out.

        Args:
            times: That every bucket is timed, in turns; the fastest time counts.

        Raises:
            EngineError: If an engine fails.
        """
        sizes = self._sizes
        random = np.random.default_rng(0)
        structures = [self._model.unit_names(block) for block in range(len(self._model.units))]
        blocks = sorted({structures.index(structure) for structure in structures})
        numpy_type = self._model.precision.numpy
        tokens = random.standard_normal(self._buffers.tokens.shape[1:]).astype(numpy_type)
        tables = {
            block: random.standard_normal(self._modulation[sizes[0], self._model.units[block]].shape[2:]) / 4
            for block in blocks
        }
        self._buffers.tokens.write(np.repeat(tokens[None], max(sizes), axis=0))
        for buffer in self._buffers.named.values():
            buffer.write(_trial_values(buffer, random))
        for rows, block in itertools.product(sizes, blocks):
            modulation = self._modulation[rows, self._model.units[block]]
            modulation.write(np.broadcast_to(tables[block].astype(numpy_type), modulation.shape).copy())
        results = {rows: self._result(rows, blocks) for rows in sizes}
        rounds = [{rows: sum(self._timed(block, rows) for block in blocks) for rows in sizes} for _ in range(times)]
        return agreeing_buckets(
            {
                rows: BucketTrial(seconds=min(seconds[rows] for seconds in rounds), result=results[rows])
                for rows in sizes
            }
        )

    def _result(self, rows: int, blocks: Sequence[int]) -> bytes | None:
        """Return what all rows of a launch come to, for each of the blocks; None if it is not the same for all."""
        results = []
        for block in blocks:
            self._launch(block, rows).run()
            outputs = (self._buffers.tokens_out, *self._buffers.units[: self._model.units[block]])
            for output in outputs:
                first, *others = (row.tobytes() for row in _part(output, slice(0, rows)).read())
                if any(other != first for other in others):
                    return None
                results.append(first)
        return b"".join(results)

    def _timed(self, block: int, rows: int) -> float:
        self._pipeline.backend.synchronize()
        started = time.perf_counter()
        self._launch(block, rows).run()
        self._pipeline.backend.synchronize()
        return time.perf_counter() - started


def _trial_values(buffer: Buffer, random: np.random.Generator) -> NDArray[np.generic]:
    """Return values of what a part takes by name, the same in every row: ones of masks, small numbers of all else."""
    if buffer.dtype is DType.INT64:
        return np.ones(buffer.shape, dtype=np.int64)
    row = random.standard_normal(buffer.shape[1:]) / 4
    return np.broadcast_to(row, buffer.shape).astype(buffer.dtype.numpy)


def _launchable(sizes: Sequence[int], limits: tuple[int, int, int] | None) -> tuple[int, ...]:
    if not sizes:
        raise RequestError("buckets is empty. Give the numbers of rows that a launch may have, as 2, 4, 8.")
    for size in sizes:
        check_integer("bucket", size, 1, MAX_BUCKET_ROWS)
    low, high = (limits[0], limits[2]) if limits is not None else (1, MAX_BUCKET_ROWS)
    kept = tuple(sorted({size for size in sizes if low <= size <= high}))
    if not kept:
        raise RequestError(
            f"buckets is {tuple(sizes)}, the bundle's engines were compiled for launches of {low} … {high} rows. "
            "Choose some of these, or rebuild the bundle with adacorr-build --batch."
        )
    return kept


def _placed(seats: Sequence[Seat]) -> Iterator[tuple[slice, Seat]]:
    """Yield each seat with its place in the launch."""
    first = 0
    for seat in seats:
        yield slice(first, first + seat.rows), seat
        first += seat.rows


def _rows(seat: Seat) -> slice:
    return slice(seat.first, seat.first + seat.rows)


def _part(buffer: Buffer, rows: slice) -> Buffer:
    return buffer if rows == slice(0, buffer.shape[0]) else buffer[rows]
