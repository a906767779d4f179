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

from adacorr_deploy.caching.decisions import (
    Action,
    Controller,
    Decision,
    Kept,
    SlotHistory,
    Span,
    SpanCache,
    keeps_output,
)
from adacorr_deploy.core.errors import EngineError, PolicyError, SamplingCancelledError
from adacorr_deploy.runtime.observer import Observer, signals_of_branches
from adacorr_deploy.runtime.revised_steps import RevisedSteps
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.span_launches import output_change, output_motion
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
    observer: Observer = field(init=False)
    _revised: RevisedSteps = field(init=False)
    _actions: set[Action] = field(default_factory=set)  # on the present step's spans that keep anything
    _errors: deque[tuple[int, int, Reading]] = field(default_factory=deque)  # step and span; not yet read

    def __post_init__(self) -> None:
        self.observer = Observer(space=self.space, controller=self.controller, batch=self.batch)
        self._revised = RevisedSteps(space=self.space, revision=self.controller.revision)

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
        spans = self.controller.spans
        for step, noise in enumerate(self.draws):
            self._deliver_errors(step)
            self._actions.clear()
            self.space.embed(step)
            if keeps_output(spans):
                yield from self._whole_step(step, noise)
            else:
                for index, (span, slot) in enumerate(zip(spans, self.space.slots.spans, strict=True)):
                    decision = self._decided(step, index, slot.history)
                    yield from self._act(step, index, span, slot, decision)
                self.space.head(step, noise)
                if self._actions <= {Action.EVALUATE}:
                    self.space.slots.output.record(step)
            self._revised.finished(step, self._actions)
            self._report(step)

    def final_latents(self) -> NDArray[np.float32]:
        """Return the latents that the last step made, (B, C, H, W), once `works` has ended.

        Raises:
            EngineError: If they are not finite.
        """
        return self._finite_latents(self.trace.steps - 1)

    def _decided(self, step: int, index: int, history: SlotHistory) -> Decision:
        """Measure what the controller asks for, take its decision on a span, and note it for each of its parts."""
        self._stop_if_cancelled(step)
        decision = self.controller.decide(step, index, history, self.observer.signals(step, index, history))
        self.observer.keep(step, index, Kept.STEP)
        if self.controller.spans[index].cache is not SpanCache.NONE:
            self._actions.add(decision.action)
        for part in self.controller.spans[index].parts:
            self.trace.record(step, part, decision, history.age(step))
        return decision

    def _whole_step(self, step: int, noise: int | None) -> Iterator[BlockWork]:
        """Decide once for all blocks: extrapolate the model's output, or evaluate it."""
        output = self.space.slots.output
        decision = self._decided(step, 0, output.history)
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
        compares = bool(output.history.steps) and self.controller.observes_change(step, 0, output.history)
        before = output.ring[output.newest_entry][0].read() if compares else None
        self.observer.keep(step, 0, Kept.EVALUATION)
        yield self._work(step, 0, self.slots)
        entry = output.next_entry
        self.space.head(step, noise)
        output.record(step)
        if measures:
            self._measured(step, 0, self.space.output_error(entry))
        if before is not None:
            self._output_changed(step, output.ring[entry][0].read(), before)

    def _work(self, step: int, first: int, slots: Sequence[CacheSlot], *, aside: bool = False) -> BlockWork:
        return BlockWork(
            space=self.space,
            step=step,
            first=first,
            slots=slots,
            aside=aside,
            stop_if_cancelled=self._stop_if_cancelled,
        )

    def _act(self, step: int, index: int, span: Span, slot: CacheSlot, decision: Decision) -> Iterator[BlockWork]:
        if decision.action is Action.EVALUATE:
            yield from self._evaluate(step, index, span, slot)
        elif span.cache is SpanCache.NONE:
            raise PolicyError(f"A policy reuses or corrects span {index}, which keeps nothing. Let it evaluate it.")
        elif decision.action is Action.REUSE:
            window = slot.window(self.controller.prediction(step, index, slot.history))
            if span.cache is SpanCache.RESIDUAL:
                self.space.spans.reuse(index, window)
            else:
                self.space.reuse(span.first, slot, window)
        else:
            yield from self._correct(step, index, span, slot, decision)

    def _evaluate(self, step: int, index: int, span: Span, slot: CacheSlot) -> Iterator[BlockWork]:
        measures = bool(slot.history.steps) and self.controller.measures_error(step, index, slot.history)
        if measures:  # before the evaluation, which overwrites the ring's oldest entry
            window = slot.window(self.controller.prediction(step, index, slot.history))
            if span.cache is SpanCache.RESIDUAL:
                self.space.spans.predict_aside(index, window)
            else:
                self.space.predict_aside(span.first, slot, window)
        self.observer.keep(step, index, Kept.EVALUATION)
        yield self._work(step, span.first, self.slots[span.first : span.stop])
        if measures:
            self._measured(step, index, self.space.error_signals(span.stop - 1))
        self._refill(step, index, span, slot)

    def _refill(self, step: int, index: int, span: Span, slot: CacheSlot, *, aside: bool = False) -> None:
        """Note that the slot holds what this step's evaluation gave, and bring a residual there: of a fresh output."""
        compares = bool(slot.history.steps) and self.controller.observes_change(step, index, slot.history)
        if span.cache is not SpanCache.RESIDUAL:
            if compares:
                raise PolicyError(f"A policy compares what span {index} keeps; that can be done with residuals alone.")
            slot.record(step)
        elif compares:
            reading = self.space.spans.keep_compared(index, aside=aside)
            motion = self.space.spans.motion() if self.controller.observes_motion else None
            slot.record(step)
            self._changed(step, index, reading(), motion() if motion is not None else None)
        elif slot.history.capacity:
            self.space.spans.keep(index, aside=aside)
            slot.record(step)

    def _output_changed(self, step: int, fresh: NDArray[np.generic], before: NDArray[np.generic]) -> None:
        motion = output_motion(fresh) if self.controller.observes_motion else None
        self._changed(step, 0, output_change(fresh, before), motion)

    def _changed(self, step: int, index: int, rows: NDArray[np.generic], motion: NDArray[np.generic] | None) -> None:
        signals = signals_of_branches(rows, self.batch, motion)
        self.observer.suspect |= not all(branch.finite for branch in signals)
        self.controller.record_change(step, index, signals)

    def _measured(self, step: int, index: int, reading: Reading) -> None:
        self._errors.append((step, index, reading))
        if not self.controller.lags:
            self._deliver_errors(step + _ERROR_LAG)

    def _deliver_errors(self, step: int) -> None:
        """Tell the controller the errors that are due: by now a GPU has gone on to later work, so nothing waits."""
        while self._errors and self._errors[0][0] + _ERROR_LAG <= step:
            measured_at, index, reading = self._errors.popleft()
            rows = np.atleast_2d(reading().T)[0]  # of signals, the first column is the relative error
            error = typical_error(rows.tolist(), self.batch)
            self.observer.suspect |= not math.isfinite(error)
            self.controller.record_error(measured_at, index, error)

    def _correct(self, step: int, index: int, span: Span, slot: CacheSlot, decision: Decision) -> Iterator[BlockWork]:
        if decision.score is None or decision.thresholds is None:
            raise PolicyError(f"A policy corrects span {index} at step {step} without a score and its thresholds.")
        prediction, last = self.controller.prediction(step, index, slot.history), span.stop - 1
        window = slot.window(prediction)
        if span.cache is SpanCache.RESIDUAL:
            if prediction.onto_kept_input:
                raise PolicyError(f"A policy blends with the cached output of span {index}, which keeps no units.")
            self.space.spans.predict_aside(index, window)
            self.observer.keep(step, index, Kept.EVALUATION)
            yield self._work(step, span.first, self.slots[span.first : span.stop])
            self.space.set_aside(last)
        else:
            predict = self.space.predict_cached if prediction.onto_kept_input else self.space.predict_aside
            predict(last, slot, window)
            self.observer.keep(step, index, Kept.EVALUATION)
            yield self._work(step, last, (slot,), aside=True)
        self.space.blend(last, self.slots[last], decision.score, decision.thresholds)
        self._refill(step, index, span, slot, aside=True)

    def _stop_if_cancelled(self, step: int) -> None:
        stop_if_cancelled(self.cancelled, step, self.trace.steps)

    def _report(self, step: int) -> None:
        if self.observer.suspect:
            self._finite_latents(step)
            self.observer.suspect = False
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
