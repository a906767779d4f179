"""Launches over spans of block parts: residuals are kept and reused, and what a controller observes is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Affine, Controller, Observed, Span, SpanCache
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.plugins import oracle
from adacorr_deploy.plugins.service_parts import (
    MOTION_PART,
    combine_part_name,
    modulated_part_name,
    probe_part_name,
)
from adacorr_deploy.runtime.slots import CacheSlot, Window

if TYPE_CHECKING:
    from adacorr_deploy.runtime.workspace import Reading, Workspace

Allocate = Callable[[tuple[int, ...], DType], Buffer]


class SpanLaunches:
    """The spans of the request that a workspace runs. Buffers are allocated when a request first needs them."""

    def __init__(self, space: Workspace, model: ModelSpec, allocate: Allocate) -> None:
        self._space = space
        self._model = model
        self._allocate = allocate
        self._spans: tuple[Span, ...] = ()
        self._buffers: dict[str, Buffer] = {}

    def begin(self, controller: Controller) -> None:
        """Write what a request's controller brings for its spans: affine maps and probes.

        Raises:
            PolicyError: If there is a map for a span that keeps no residual, or one of another width than the model's.
        """
        self._spans = controller.spans
        for index, span in enumerate(self._spans):
            affine = controller.affine(index)
            if span.cache is SpanCache.RESIDUAL:
                self._write_affine(index, affine)
            elif affine is not None:
                raise PolicyError(f"A policy maps span {index}, which keeps {span.cache.value}; maps are of residuals.")
            for probe in (each for each in controller.observations(index) if each.what is Observed.PROBE):
                self._write(f"weights {index}", np.asarray(probe.weights, dtype=np.float32))
                self._write(f"bias {index}", np.asarray([probe.bias], dtype=np.float32), width=1)

    # --- Residuals -----------------------------------------------------------------------------------------------

    def reuse(self, index: int, window: Window) -> None:
        """Let the slot's residuals stand for the span: its output is its input and their combination."""
        self._combine_residuals(index, window, "reuse", self._space.block_output(self._spans[index].stop - 1))

    def predict_aside(self, index: int, window: Window) -> None:
        """Predict the span's output from its present input into the estimate buffer."""
        self._combine_residuals(index, window, "aside", self._space.blocks.estimate)

    def keep(self, index: int, *, aside: bool = False) -> None:
        """Store what the span has just added to its input in its slot's oldest entry; the caller records it.

        Where the span was corrected, its fresh output stands `aside` (`Workspace.set_aside`).
        """
        slot = self._slot(index)
        entry = slot.next_entry
        self._subtract(("keep", index, entry, int(aside)), self._spans[index], slot.ring[entry][0], aside=aside)

    def keep_compared(self, index: int, *, aside: bool = False) -> Reading:
        """Do as `keep`, and compare it with what the evaluation before had stored: (R, 9) signals."""
        slot, space = self._slot(index), self._space
        fresh, before = space.blocks.estimate, slot.newest_entry  # aside: of a ring of one, it is overwritten
        self._subtract(("change", index, int(aside)), self._spans[index], fresh, aside=aside)
        reading = space.compare(("change", index, before), fresh, slot.ring[before][0])
        slot.ring[slot.next_entry][0].copy_from(fresh)
        return reading

    def motion(self) -> Reading:
        """Measure how much what `keep_compared` has just stored moves from frame to frame: (R,)."""
        result = self._row_result("motion")
        self._space.bound.run(
            (MOTION_PART,),
            lambda: {
                "tokens": self._space.blocks.estimate,
                "frame_positions": self._space.image.request["frame_positions"],
                "motion": result,
            },
        )
        return result.read_later()

    def _combine_residuals(self, index: int, window: Window, use: str, tokens_out: Buffer) -> None:
        factors = self._space.factors(window)
        span = self._spans[index]
        self._space.bound.run(
            (combine_part_name(window.entries), use, index, window.start),
            lambda: {
                "base": self._space.block_input(span.first),
                "history": self._slot(index).ring[window.start : window.stop],
                "coefficients": factors.coefficients,
                "scale": self._buffers[f"scale {index}"],
                "shift": self._buffers[f"shift {index}"],
                "tokens_out": tokens_out,
            },
        )

    def _subtract(self, use: tuple[str | int, ...], span: Span, difference: Buffer, *, aside: bool = False) -> None:
        """Compute what a span has added: its output minus its input, which its parts have left as it was."""
        self._space.bound.run(
            (combine_part_name(1), *use),
            lambda: {
                "base": self._space.blocks.fresh if aside else self._space.block_output(span.stop - 1),
                "history": self._space.block_input_as_history(span.first),
                "coefficients": self._constant("minus one", -1.0, width=1),
                "scale": self._constant("one", 1.0),
                "shift": self._constant("zero", 0.0),
                "tokens_out": difference,
            },
        )

    # --- Observations --------------------------------------------------------------------------------------------

    def observed(self, index: int, what: Observed) -> Buffer:
        """Return what is observed of a span, (R, N, D); one that is computed holds until the next is.

        Raises:
            PolicyError: If it is the residual of the span before the first.
        """
        first = self._spans[index].first
        match what:
            case Observed.INPUT:
                return self._space.block_input(first)
            case Observed.RESIDUAL:
                if index == 0:
                    raise PolicyError("A policy observes what the span before the first added. Let it take the input.")
                self._subtract(("observed", index), self._spans[index - 1], self._target())
            case _:
                self._modulate(first)
        return self._target()

    def probe(self, index: int) -> Reading:
        """Probe the modulated input of a span's first part: (R,)."""
        first, result = self._spans[index].first, self._row_result("probe")
        self._space.bound.run(
            (probe_part_name(self._model, units=self._model.units[first]), index),
            lambda: {
                **self._modulation(first),
                "weights": self._buffers[f"weights {index}"],
                "bias": self._buffers[f"bias {index}"],
                "probe": result,
            },
        )
        return result.read_later()

    def _modulate(self, part: int) -> None:
        self._space.bound.run(
            (modulated_part_name(self._model, units=self._model.units[part]), part),
            lambda: {**self._modulation(part), "tokens_out": self._target()},
        )

    def _modulation(self, part: int) -> dict[str, Buffer]:
        space = self._space
        return {
            "tokens": space.block_input(part),
            "modulation": space.blocks.modulation[part],
            "step": space.image.step,
        }

    # --- Buffers -------------------------------------------------------------------------------------------------

    def _slot(self, index: int) -> CacheSlot:
        return self._space.slots.spans[index]

    def _target(self) -> Buffer:
        tokens = self._space.blocks.zeros
        return self._buffer("observed", tokens.shape, tokens.dtype)

    def _row_result(self, name: str) -> Buffer:
        return self._buffer(name, (self._space.blocks.zeros.shape[0],), DType.FLOAT32)

    def _write_affine(self, index: int, affine: Affine | None) -> None:
        width = self._model.width
        scale, shift = (np.ones(width), np.zeros(width)) if affine is None else (affine.scale, affine.shift)
        self._write(f"scale {index}", np.asarray(scale, dtype=np.float32))
        self._write(f"shift {index}", np.asarray(shift, dtype=np.float32))

    def _write(self, name: str, values: NDArray[np.float32], *, width: int | None = None) -> None:
        wanted = (self._model.width if width is None else width,)
        if values.shape != wanted:
            raise PolicyError(f"A policy brings {len(values)} numbers for {name}; the model has {wanted[0]} channels.")
        self._buffer(name, wanted, DType.FLOAT32).write(values)

    def _constant(self, name: str, value: float, *, width: int | None = None) -> Buffer:
        known = name in self._buffers
        buffer = self._buffer(name, (self._model.width if width is None else width,), DType.FLOAT32)
        if not known:
            buffer.write(np.full(buffer.shape, value, dtype=np.float32))
        return buffer

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: DType) -> Buffer:
        if name not in self._buffers:
            self._buffers[name] = self._allocate(shape, dtype)
        return self._buffers[name]


def output_change(fresh: NDArray[np.generic], before: NDArray[np.generic]) -> NDArray[np.float32]:
    """Compare two outputs of the model, (B, C, H, W), as signals compare tokens: (B, 9), an image as one token."""
    images = (np.asarray(each, dtype=np.float32).reshape(len(each), 1, -1) for each in (fresh, before))
    return oracle.signals(*images)


def output_motion(outputs: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return how much outputs of the model, (B, C, F, H, W), move from frame to frame: (B,)."""
    frames = np.moveaxis(np.asarray(outputs, dtype=np.float32), 2, 1)
    return oracle.motion(frames.reshape(*frames.shape[:2], -1))
