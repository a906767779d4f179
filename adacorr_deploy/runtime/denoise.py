"""The denoise loop: the paper on one screen, then what each action does.

The loop yields its heavy launches, the evaluation of blocks, instead of running them. Whoever drives it runs each one
before it asks for the next: one request alone runs them as they come, and `batching` lets requests share them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Action, Controller, Decision, Signals, SlotHistory, keeps_output
from adacorr_deploy.core.errors import EngineError, PolicyError, SamplingCancelledError
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.trace import Trace
from adacorr_deploy.runtime.workspace import Reading, Workspace

_ERROR_LAG: Final = 2  # steps after which a lagging controller learns of an error: by then the next step is queued
_SMALLEST_ERROR: Final = 1e-6  # relative errors below float32's noise count as this


class Progress(Protocol):
    """Called after each step."""

    def __call__(self, step: int, steps: int, rho: float) -> None:
        """Take the number of finished steps, of all steps, and the share of block launches skipped so far."""
        ...


LatentsObserver = Callable[[int, NDArray[np.float32]], None]  # the step just finished, and a host copy of its latents


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """Consecutive blocks that a request wants evaluated, one on the other's output, before its loop goes on.

    Attributes:
        space: The request's workspace: `block_input(first)` holds the tokens that the first block reads.
        step: The denoising step, whose modulation the blocks take.
        first: Index of the first block part.
        slots: Of these block parts, in order; each evaluation's units go to its slot's `next_entry`.
        aside: Whether the output goes to `space.blocks.fresh`, to be corrected, instead of the next block's input.
        stop_if_cancelled: To be called between two of the blocks.
    """

    space: Workspace
    step: int
    first: int
    slots: Sequence[CacheSlot]
    aside: bool = False
    stop_if_cancelled: Callable[[int], None]

    def run(self) -> None:
        """Evaluate the blocks, for this request alone.

        Raises:
            EngineError: If an engine fails.
            SamplingCancelledError: If the request was cancelled between two blocks.
        """
        if len(self.slots) > 1 and self.space.evaluate_fused(self.first, self.slots):
            return
        for block, slot in enumerate(self.slots, self.first):
            if block > self.first:
                self.stop_if_cancelled(self.step)
            self.space.evaluate(block, slot, aside=self.aside)


@dataclass(slots=True, kw_only=True)
class Denoiser:
    """One request on its way through a workspace."""

    space: Workspace
    slots: Sequence[CacheSlot]
    controller: Controller
    trace: Trace
    batch: int
    draws: Iterator[int | None]  # which draw each step adds; None where the sampler adds none
    progress: Progress | None
    cancelled: Callable[[], bool] | None
    on_latents: LatentsObserver | None = None
    _suspect: bool = False  # something was not finite in this step
    _errors: deque[tuple[int, int, Reading]] = field(default_factory=deque)  # step and block; not yet read
    _signals_of: dict[int, tuple[int, Reading]] = field(
        default_factory=dict
    )  # block → when it was filled, last signals

    def run(self) -> NDArray[np.float32]:
        """Denoise this request alone, and return the final latents, (B, C, H, W).

        Raises:
            SamplingCancelledError: If `cancelled` said so between two blocks.
            EngineError: If an engine fails, or the latents are not finite.
            PolicyError: If the controller asks for what its slot can't give.
        """
        for work in self.works():
            work.run()
        return self.final_latents()

    def works(self) -> Iterator[BlockWork]:
        """Denoise, yielding every evaluation of blocks; each must have run before the next is asked for.

        Raises:
            SamplingCancelledError: If `cancelled` said so before a block.
            EngineError: If an engine fails, or the latents are not finite.
            PolicyError: If the controller asks for what its slot can't give.
        """
        whole_steps = keeps_output(self.controller.spans)
        for step, noise in enumerate(self.draws):
            self._deliver_errors(step)
            self.space.embed(step)
            if whole_steps:
                yield from self._whole_step(step, noise)
            else:
                for block, slot in enumerate(self.slots):
                    self._stop_if_cancelled(step)
                    signals = self._signals(step, block, slot.history)
                    decision = self.controller.decide(step, block, slot.history, signals)
                    self.trace.record(step, block, decision, slot.history.age(step))
                    yield from self._act(step, block, slot, decision)
                self.space.head(step, noise)
            self._report(step)

    def final_latents(self) -> NDArray[np.float32]:
        """Return the latents that the last step made, (B, C, H, W), once `works` has ended.

        Raises:
            EngineError: If they are not finite.
        """
        return self._finite_latents(self.trace.steps - 1)

    def _whole_step(self, step: int, noise: int | None) -> Iterator[BlockWork]:
        """Decide once for all blocks: extrapolate the model's output, or evaluate it."""
        output = self.space.slots.output
        self._stop_if_cancelled(step)
        decision = self.controller.decide(step, 0, output.history, self._signals(step, 0, output.history))
        for block in range(len(self.slots)):
            self.trace.record(step, block, decision, output.history.age(step))
        if decision.action is Action.REUSE:
            prediction = self.controller.prediction(step, 0, output.history)
            self.space.extrapolate(step, noise, output.window(prediction))
        elif decision.action is Action.EVALUATE:
            yield from self._evaluate_whole_step(step, noise, output)
        else:
            raise PolicyError("A policy that decides over whole steps corrects a block. Let it evaluate or reuse.")

    def _evaluate_whole_step(self, step: int, noise: int | None, output: CacheSlot) -> Iterator[BlockWork]:
        measures = bool(output.history.steps) and self.controller.measures_error(step, 0, output.history)
        if measures:  # before the head, which overwrites the ring's oldest entry
            prediction = self.controller.prediction(step, 0, output.history)
            self.space.predict_output_aside(step, output.window(prediction))
        yield from self._evaluate_blocks(step)
        entry = output.next_entry
        self.space.head(step, noise)
        output.record(step)
        if measures:
            self._measured(step, 0, self.space.output_error(entry))

    def _evaluate_blocks(self, step: int) -> Iterator[BlockWork]:
        if all(slot.reference is None for slot in self.slots[1:]):
            self._keep_reference(0, self.slots[0])
            yield self._work(step, 0, self.slots)
            return
        for block, slot in enumerate(self.slots):
            self._stop_if_cancelled(step)
            self._keep_reference(block, slot)
            yield self._work(step, block, (slot,))

    def _work(self, step: int, first: int, slots: Sequence[CacheSlot], *, aside: bool = False) -> BlockWork:
        return BlockWork(
            space=self.space,
            step=step,
            first=first,
            slots=slots,
            aside=aside,
            stop_if_cancelled=self._stop_if_cancelled,
        )

    def _act(self, step: int, block: int, slot: CacheSlot, decision: Decision) -> Iterator[BlockWork]:
        if decision.action is Action.REUSE:
            prediction = self.controller.prediction(step, block, slot.history)
            self.space.reuse(block, slot, slot.window(prediction))
        elif decision.action is Action.EVALUATE:
            yield from self._evaluate(step, block, slot)
        else:
            yield from self._correct(step, block, slot, decision)

    def _evaluate(self, step: int, block: int, slot: CacheSlot) -> Iterator[BlockWork]:
        measures = bool(slot.history.steps) and self.controller.measures_error(step, block, slot.history)
        if measures:  # before the evaluation, which overwrites the ring's oldest entry
            prediction = self.controller.prediction(step, block, slot.history)
            self.space.predict_aside(block, slot, slot.window(prediction))
        yield self._work(step, block, (slot,))
        self._refill(step, block, slot)
        if measures:
            self._measured(step, block, self.space.error_signals(block))

    def _measured(self, step: int, block: int, reading: Reading) -> None:
        self._errors.append((step, block, reading))
        if not self.controller.lags:
            self._deliver_errors(step + _ERROR_LAG)

    def _deliver_errors(self, step: int) -> None:
        """Tell the controller the errors that are due: by now a GPU has gone on to later work, so nothing waits."""
        while self._errors and self._errors[0][0] + _ERROR_LAG <= step:
            measured_at, block, reading = self._errors.popleft()
            rows = np.atleast_2d(reading().T)[0]  # of signals, the first column is the relative error
            error = typical_error(rows.tolist(), self.batch)
            self._suspect |= not math.isfinite(error)
            self.controller.record_error(measured_at, block, error)

    def _correct(self, step: int, block: int, slot: CacheSlot, decision: Decision) -> Iterator[BlockWork]:
        if decision.score is None or decision.thresholds is None:
            raise PolicyError(f"A policy corrects block {block} at step {step} without a score and its thresholds.")
        prediction = self.controller.prediction(step, block, slot.history)
        predict = self.space.predict_cached if prediction.onto_kept_input else self.space.predict_aside
        predict(block, slot, slot.window(prediction))
        yield self._work(step, block, (slot,), aside=True)
        self._refill(step, block, slot)
        self.space.blend(block, slot, decision.score, decision.thresholds)

    def _refill(self, step: int, block: int, slot: CacheSlot) -> None:
        """Note that the slot holds the fresh units of this step, and the input that they came from."""
        slot.record(step)
        self._keep_reference(block, slot)

    def _keep_reference(self, block: int, slot: CacheSlot) -> None:
        if slot.reference is not None:
            slot.reference.copy_from(self.space.block_input(block))

    def _signals(self, step: int, block: int, history: SlotHistory) -> list[Signals] | None:
        if not history.steps or not self.controller.needs_signals(step, block, history):
            return None
        filled, reading = history.steps[0], self.space.input_signals(block, self.slots[block])
        if self.controller.lags:
            (filled_then, reading_then), self._signals_of[block] = (
                self._signals_of.get(block, (None, reading)),
                (filled, reading),
            )
            if filled_then != filled:  # the slot was refilled since, or nothing was measured
                return None
            reading = reading_then
        signals = signals_of_branches(reading(), self.batch)
        self._suspect |= not all(branch.finite for branch in signals)
        return signals

    def _stop_if_cancelled(self, step: int) -> None:
        stop_if_cancelled(self.cancelled, step, self.trace.steps)

    def _report(self, step: int) -> None:
        if self._suspect:
            self._finite_latents(step)
            self._suspect = False
        if self.on_latents is not None:
            self.on_latents(step, self.space.read_latents(step))
        if self.progress is not None:
            self.progress(step + 1, self.trace.steps, self.trace.rho)

    def _finite_latents(self, step: int) -> NDArray[np.float32]:
        latents = self.space.read_latents(step)
        check_finite(latents, step, self.trace.steps)
        return latents


def stop_if_cancelled(cancelled: Callable[[], bool] | None, step: int, steps: int) -> None:
    """Ask a caller whether its request goes on at `step`.

    Raises:
        SamplingCancelledError: If not.
    """
    if cancelled is not None and cancelled():
        raise SamplingCancelledError(f"Cancelled at step {step + 1} of {steps}; nothing was kept.")


def check_finite(latents: NDArray[np.float32], step: int, steps: int) -> None:
    """Refuse the latents that `step` made if there is no image in them.

    Raises:
        EngineError: If they hold NaN or infinite values.
    """
    if not np.isfinite(latents).all():
        raise EngineError(
            f"The latents hold NaN or infinite values after step {step + 1} of {steps}. "
            "Check the model with adacorr-validate; in fp16 build it with --precision fp32."
        )


def typical_error(rows: Sequence[float], batch: int) -> float:
    """Return the geometric mean over images of each image's error, the larger of its branches': what calibration keeps.

    Args:
        rows: (R,) or (B,) relative errors, ≥ 0, the conditional rows first. One that is not finite makes the result so.
        batch: B.
    """
    # Unlike Python's, NumPy's maximum is NaN if any value is.
    images = [float(np.max(rows[image::batch])) for image in range(batch)]
    if not all(math.isfinite(error) for error in images):
        return math.nan
    return math.exp(math.fsum(math.log(max(error, _SMALLEST_ERROR)) for error in images) / batch)


def signals_of_branches(rows: NDArray[np.generic], batch: int) -> list[Signals]:
    """Sum up the signals part's rows, one `Signals` per guidance branch.

    A branch's offset is the RMS over its B images, its 95th percentile the largest of theirs, and the rest their mean.
    A row that is not finite makes the branch's value not finite.

    Args:
        rows: (R, 9), the conditional rows first.
        batch: B.
    """
    values: list[list[float]] = rows.tolist()
    return [_branch_signals(values[first : first + batch]) for first in range(0, len(values), batch)]


def _branch_signals(rows: Sequence[Sequence[float]]) -> Signals:
    offset, p95, spatial, paper_temporal, paper_spatial, *means = zip(*rows, strict=True)
    count = len(rows)
    change_l1, reference_l1, change_square, reference_square = (sum(column) / count for column in means)
    return Signals(
        relative_offset=_root_mean_square(offset),
        relative_offset_p95=float(np.max(p95)),
        spatial_change=sum(spatial) / count,
        paper_temporal=sum(paper_temporal) / count,
        paper_spatial=sum(paper_spatial) / count,
        change_l1=change_l1,
        reference_l1=reference_l1,
        change_square=change_square,
        reference_square=reference_square,
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
