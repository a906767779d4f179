"""Driving a workspace from any step with any cache: what calibration asks, and a request never does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.plugins import oracle
from adacorr_deploy.quality.span_residuals import SpanResiduals, Tokens
from adacorr_deploy.runtime.revised_steps import take_again
from adacorr_deploy.runtime.slots import CacheSlot, Window
from adacorr_deploy.runtime.workspace import Workspace

Latents = NDArray[np.float32]  # (B, C, H, W)
# Per block part (U, R, N, D); or per span its residual, (R, N, D); or the model's output alone, (1, B, C, H, W).
Units = list[NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a step starts from."""

    latents: Latents
    carried: Latents  # by a multistep sampler, from the step before


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One prepared request, whose steps are run in any order. The sampler must add no noise.

    Attributes:
        residuals: Of a predictor of residuals, its spans; they stand in place of the slots.
    """

    space: Workspace
    slots: Sequence[CacheSlot]
    predictor: Predictor
    residuals: SpanResiduals | None = None

    def first(self, latents: Latents) -> State:
        """Return what step 0 starts from."""
        return State(latents=latents, carried=np.zeros_like(latents))

    def start(self, step: int, state: State) -> None:
        """Put a state where `step` reads it, and make its tokens."""
        self._put(step, state)
        self.space.embed(step)

    def _put(self, step: int, state: State) -> None:
        self.space.image.latents[step % 2].write(state.latents)
        self.space.image.carried[step % 2].write(state.carried)

    def finish(self, step: int) -> State:
        """Run the head, and return the state that `step` leads to."""
        self.space.head(step, None)
        return self._after(step)

    def _after(self, step: int) -> State:
        carried = np.asarray(self.space.image.carried[(step + 1) % 2].read(), dtype=np.float32)
        return State(latents=self.space.read_latents(step), carried=carried)

    def evaluated_step(self, step: int, state: State) -> State:
        """Evaluate every block of a step."""
        self.start(step, state)
        for block, slot in enumerate(self.slots):
            self.space.evaluate(block, slot)
        return self.finish(step)

    def evaluated_run(self, first_step: int, steps: int, state: State) -> Latents:
        """Evaluate every step from `first_step` on, and return the final latents."""
        for step in range(first_step, steps):
            state = self.evaluated_step(step, state)
        return state.latents

    @property
    def predicting_slots(self) -> Sequence[CacheSlot]:
        """The slots that the predictor reads: one per block, or the output's alone."""
        return (self.space.slots.output,) if self.predictor.whole_step else self.slots

    def fill(self, evaluations: Mapping[int, Units]) -> None:
        """Fill the slots as if exactly these steps had been evaluated, in their order."""
        if self.residuals is not None:
            self.residuals.fill(evaluations)
            return
        for index, slot in enumerate(self.predicting_slots):
            slot.fill([(step, evaluations[step][index]) for step in sorted(evaluations)])

    def skipped_run(self, first_step: int, count: int, state: State) -> list[State]:
        """Skip `count` steps on the slots' predictions, and return the state after each."""
        results = []
        for step in range(first_step, first_step + count):
            state = self._skipped_step(step, state)
            results.append(state)
        return results

    def revised_step(
        self, evaluated: int, strayed: State, first: int, begun: State, outputs: Mapping[int, Units]
    ) -> State:
        """Evaluate the step after a skip, take the skipped steps again, and return the state that it leads to then.

        Args:
            evaluated: The step.
            strayed: What the skip led to.
            first: The first step that was skipped.
            begun: What that one started from.
            outputs: The model's, of the evaluations before, by step.
        """
        slot = self.space.slots.output
        slot.fill([(step, outputs[step][-1]) for step in sorted(outputs)])
        self.evaluated_step(evaluated, strayed)
        slot.record(evaluated)
        self._put(first, begun)
        take_again(self.space, self.predictor.revision, first, evaluated)
        return self._after(evaluated)

    def _skipped_step(self, step: int, state: State) -> State:
        self.start(step, state)
        if self.predictor.whole_step:
            self.space.extrapolate(step, None, self._window(self.space.slots.output, step))
            return self._after(step)
        if self.residuals is not None:
            self._skip_spans(step, self.residuals)
            return self.finish(step)
        for block, slot in enumerate(self.slots):
            self.space.reuse(block, slot, self._window(slot, step))
        return self.finish(step)

    def _skip_spans(self, step: int, residuals: SpanResiduals) -> None:
        """Estimate the spans that keep residuals, and evaluate the other block parts."""
        block = 0
        while block < len(self.slots):
            index = residuals.starting_at(block)
            if index is None:
                self.space.evaluate(block, self.slots[block])
                block += 1
            else:
                estimate = residuals.estimate(index, step, self.space.block_input(block).read())
                block = residuals.spans[index].stop
                self.space.block_input(block).write(estimate)

    def span_error(self, index: int, step: int, entered: Tokens) -> NDArray[np.float64]:
        """Compare a span's estimate with its fresh output, which was just evaluated, as `block_error` does."""
        if self.residuals is None:
            raise AssertionError("spans without residuals")
        fresh = self.space.block_input(self.residuals.spans[index].stop).read()
        estimate = self.residuals.estimate(index, step, entered)
        return np.asarray(oracle.signals(_f32(estimate), _f32(fresh)), dtype=np.float64)[:, 0]

    def block_error(self, block: int, step: int) -> NDArray[np.float64]:
        """Compare a block's prediction with its fresh output, which was just evaluated: relative error per row, (R,).

        The slot holds the evaluations to predict from; the fresh input and output are still in the block's buffers.
        """
        slot = self.slots[block]
        self.space.predict_aside(block, slot, self._window(slot, step))
        return np.asarray(self.space.error_signals(block)(), dtype=np.float64)[:, 0]

    def output_error(
        self, step: int, evaluations: Mapping[int, Units], fresh: NDArray[np.generic]
    ) -> NDArray[np.float64]:
        """Compare the output that these evaluations predict with the fresh one, (1, B, C, H, W): per image, (B,)."""
        slot = self.space.slots.output
        self.fill(evaluations)
        self.space.predict_output_aside(step, self._window(slot, step))
        entry = slot.next_entry
        slot.ring[entry].write(fresh)
        return np.asarray(self.space.output_error(entry)(), dtype=np.float64)

    def _window(self, slot: CacheSlot, step: int) -> Window:
        return slot.window(self.predictor.prediction(step, slot.history.steps))


def _f32(values: Tokens) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)
