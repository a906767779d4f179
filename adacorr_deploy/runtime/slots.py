"""Cache slots: what one block of one request keeps, in buffers that were allocated once.

A slot holds the units (attention and MLP results before their gates) of the last T evaluations in a ring. An evaluation
writes into the entry of the oldest one by bound address; nothing is ever moved. Controllers speak of evaluations newest
first, the ring knows where each stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Prediction, SlotHistory, Span, SpanCache
from adacorr_deploy.core.errors import EngineError, PolicyError
from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.engines.backend import Backend, Buffer
from adacorr_deploy.runtime.buffers import RunSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The run of ring entries that a prediction reads, with its factors in the ring's order."""

    start: int
    stop: int
    coefficients: tuple[float, ...]
    gate_steps: tuple[int, ...]

    @property
    def entries(self) -> int:
        return self.stop - self.start


@dataclass(slots=True)
class CacheSlot:
    """The cache of one span: both guidance branches of one request stand in its rows."""

    ring: Buffer  # (T, U, R, N, D): a part's units, or (T, 1, R, N, D): a span's residuals, of the last T evaluations
    zeros: Buffer  # (R, N, D), never written
    history: SlotHistory  # steps of those evaluations, newest first; its capacity is 0 in a run that keeps no cache
    references: tuple[Buffer, ...] = ()  # (R, N, D) each: what this request's policy observes, as it was earlier
    _allocated: list[Buffer] = field(default_factory=list)  # references of this request and those before
    _filled: int = 0

    @property
    def reference(self) -> Buffer | None:
        """The first of the references; None where the policy wants none.

        Of a policy that observes the input, it is the input of the last evaluation.
        """
        return self.references[0] if self.references else None

    @property
    def kept_reference(self) -> Buffer:
        """The reference of a policy that wants one.

        Raises:
            EngineError: If it doesn't.
        """
        if self.reference is None:
            raise EngineError("The slot keeps no reference input. Let the policy's controller observe the input.")
        return self.reference

    @property
    def next_entry(self) -> int:
        """The ring entry that the next evaluation overwrites: the oldest."""
        return self._filled % self.ring.shape[0]

    @property
    def newest_entry(self) -> int:
        """The ring entry of the last evaluation."""
        return (self._filled - 1) % self.ring.shape[0]

    def record(self, step: int) -> None:
        """Note that the units in `next_entry` are those of an evaluation at `step`."""
        self._filled += 1
        self.history.record(step)

    def fill(self, evaluations: Sequence[tuple[int, NDArray[np.generic]]]) -> None:
        """Hold exactly these evaluations (step and units, (U, R, N, D)), oldest first: for calibration."""
        self.history.clear()
        for self._filled, (step, units) in enumerate(evaluations):
            self.ring[self.next_entry].write(units)
            self.history.record(step)
        self._filled = len(evaluations)

    def window(self, prediction: Prediction) -> Window:
        """Return the ring entries that hold the evaluations of a prediction.

        The run may hold an entry that the prediction does not use (the newest two of three may stand at the ring's two
        ends): its coefficient is 0. Every entry in the run was filled by this request.

        Raises:
            PolicyError: If the prediction uses more evaluations than the slot holds, or none.
        """
        wanted = len(prediction.coefficients)
        if not 0 < wanted <= len(self.history.steps) or wanted != len(prediction.gate_steps):
            raise PolicyError(
                f"A policy predicts from {wanted} evaluations ({len(prediction.gate_steps)} gate steps), and the slot "
                f"holds {len(self.history.steps)} of at most {self.history.capacity}. Let it evaluate the block first."
            )
        size = self.ring.shape[0]
        entries = [(self._filled - 1 - newest) % size for newest in range(wanted)]
        start, stop = min(entries), max(entries) + 1
        coefficients = [0.0] * (stop - start)
        gate_steps = [prediction.gate_steps[0]] * (stop - start)
        for entry, coefficient, gate_step in zip(entries, prediction.coefficients, prediction.gate_steps, strict=True):
            coefficients[entry - start] = coefficient
            gate_steps[entry - start] = gate_step
        return Window(start=start, stop=stop, coefficients=tuple(coefficients), gate_steps=tuple(gate_steps))

    def clear(self) -> None:
        """Forget everything, also the numbers themselves."""
        self.history.clear()
        self._filled = 0
        if self.history.capacity:
            for entry in range(self.ring.shape[0]):
                for unit in range(self.ring.shape[1]):
                    self.ring[entry][unit].copy_from(self.zeros)
        for reference in self._allocated:
            reference.copy_from(self.zeros)

    def keep_references(self, count: int, allocate: Callable[[], Buffer]) -> None:
        """Choose how many references this request keeps; a buffer is allocated once, by the first that wants it."""
        while len(self._allocated) < count:
            self._allocated.append(allocate())
        self.references = tuple(self._allocated[:count])


class SlotPool:
    """The slots of one workspace, lent to one request at a time: one per block part, and one for the model's output.

    Where the workspace is laid out for spans, one per span besides: of one that keeps units it is its part's. The slots
    of parts that keep nothing themselves share one ring, since their units must still go somewhere.
    """

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        output: CacheSlot,
        allocate_reference: Callable[[], Buffer],
        spans: Sequence[CacheSlot] = (),
    ) -> None:
        self._slots = tuple(slots)
        self.spans = tuple(spans) or self._slots  # a span over the whole step keeps its reference in the first
        self.output = output
        self._allocate_reference = allocate_reference
        self._lent = False

    def __len__(self) -> int:
        return len(self._slots)

    @contextmanager
    def lease(self, *, references: Callable[[int], int]) -> Iterator[tuple[CacheSlot, ...]]:
        """Lend the parts' slots, cleared; all are cleared again when they come back, however the request ends.

        Args:
            references: Says of each span, by index, how many references its slot keeps.

        Raises:
            EngineError: If another request holds them.
        """
        if self._lent:
            raise EngineError("These cache slots belong to another request. Wait until it has ended.")
        self._lent = True
        try:
            for index, slot in enumerate(self.spans):
                slot.keep_references(references(index), self._allocate_reference)
            self._clear()
            yield self._slots
        finally:
            self._lent = False  # first: an interrupt while clearing must not lock the pool, and a lease clears anyway
            self._clear()

    def _clear(self) -> None:
        for slot in {id(slot): slot for slot in (*self._slots, *self.spans, self.output)}.values():
            slot.clear()


def allocate_slots(backend: Backend, model: ModelSpec, size: RunSize, zeros: Buffer) -> SlotPool:
    """Allocate the slots of a run: of block parts, of spans that keep residuals, and of the model's output.

    Args:
        backend: Allocates.
        model: The model.
        size: Of the run.
        zeros: (R, N, D) in the model's precision, never written.
    """
    parts = _slots_of_parts(backend, model, size, zeros)
    return SlotPool(
        parts,
        _output_slot(backend, model, size),
        allocate_reference=lambda: backend.allocate(zeros.shape, zeros.dtype),
        spans=[_span_slot(backend, span, size, parts, zeros) for span in size.spans],
    )


def _slots_of_parts(backend: Backend, model: ModelSpec, size: RunSize, zeros: Buffer) -> list[CacheSlot]:
    """Allocate a slot per block part. Units that nobody keeps must still go somewhere: into one ring for all."""
    kept = size.kept_parts(len(model.units))

    def ring(units: int, entries: int) -> Buffer:
        return backend.allocate((entries, units, *zeros.shape), model.precision)

    shared = {
        units: ring(units, 1) for units in {model.units[part] for part in range(len(model.units)) if part not in kept}
    }
    return [
        CacheSlot(
            ring=ring(units, size.history) if part in kept else shared[units],
            zeros=zeros,
            history=SlotHistory(capacity=size.history if part in kept else 0),
        )
        for part, units in enumerate(model.units)
    ]


def _span_slot(backend: Backend, span: Span, size: RunSize, parts: Sequence[CacheSlot], zeros: Buffer) -> CacheSlot:
    """Return the slot of a span: its part's where it keeps units or nothing, else a ring of residuals."""
    if span.cache is not SpanCache.RESIDUAL:
        return parts[span.first]
    return CacheSlot(
        ring=backend.allocate((max(size.history, 1), 1, *zeros.shape), zeros.dtype),
        zeros=zeros,
        history=SlotHistory(capacity=size.history),
    )


def _output_slot(backend: Backend, model: ModelSpec, size: RunSize) -> CacheSlot:
    """Allocate the slot of the model's output: a unit of its own, an image large."""
    image = (size.batch, *model.latents.shape_at(size.latents))
    return CacheSlot(
        ring=backend.allocate((max(size.output_history, 1), 1, *image), DType.FLOAT32),
        zeros=backend.allocate(image, DType.FLOAT32),
        history=SlotHistory(capacity=size.output_history),
    )
