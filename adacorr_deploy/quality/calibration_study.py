"""The measurements of a calibration: a trajectory without caching, and what skipping from each of its steps does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.calibration import MAX_MEASURE, Calibration, CalibrationKey, Probe
from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.caching.scores import paper_score, robust_score
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.replay import Latents, Replay, State, Units
from adacorr_deploy.quality.skip_measurements import (
    FLOOR,
    MAX_GAP,
    MAX_SKIPPED,
    SkipMeasurements,
    bounded,
    geometric_mean,
)
from adacorr_deploy.quality.span_residuals import Tokens
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.observer import signals_of_branches

_GAIN_STRIDE: Final = 3  # at least; no more than _GAINS in all
_GAINS: Final = 17
_STORED: Final = 50  # times that partial results are stored, about
_TYPICAL: Final = 2  # distance and gap at which gains and difficulties are measured


def window_steps(predictor: Predictor) -> int:
    """Return from how many steps back the oldest evaluation is read that a prediction or a revision uses."""
    return MAX_SKIPPED + (_evaluations_read(predictor) - 1) * MAX_GAP


def _evaluations_read(predictor: Predictor) -> int:
    """Return how many evaluations before a skip its prediction and its revision use."""
    return max(predictor.history, predictor.revision.evaluations - 1)


class CalibrationStudy:
    """The measurements of one batch of calibration images."""

    def __init__(self, replay: Replay, request: SampleRequest, progress: Progress, partials: Partials | None) -> None:
        blocks = len(replay.slots)
        self._replay = replay
        self._batch = request.batch
        self._steps = request.steps
        self._progress = progress
        self._partials = partials
        # At three quarters of the depth, a block's errors follow the final one's best; whole steps have no blocks.
        self._probe_block = _probe_block(replay)
        self._revises = replay.predictor.revision is not Revision.NONE
        self._gaps = MAX_GAP if _evaluations_read(replay.predictor) > 1 else 1  # what is held does not know any
        self._trajectory: list[State] = []  # what each step starts from, and what the last one leads to
        self._window: dict[int, Units] = {}  # the units of the last evaluations, by step
        self._outputs: dict[int, Units] = {}  # the model's at these steps, where it or a revision keeps them
        self._first_inputs: dict[int, NDArray[np.generic]] = {}  # the first block's inputs, by step
        self._gain_stride = max(_GAIN_STRIDE, self._steps // _GAINS)
        self._found = SkipMeasurements.empty(steps=self._steps, blocks=blocks, batch=self._batch)

    def record(self, latents: Latents) -> None:
        """Run the trajectory without caching, or take up the one that an interrupted run stored."""
        like = np.empty((self._steps + 1, *latents.shape), np.float32)
        wanted = {"latents": like, "carried": like}
        stored = self._partials.load("trajectory", wanted) if self._partials is not None else None
        if stored is not None:
            pairs = zip(stored["latents"], stored["carried"], strict=True)
            self._trajectory = [
                State(latents=np.asarray(each, np.float32), carried=np.asarray(carried, np.float32))
                for each, carried in pairs
            ]
            return
        state = self._replay.first(latents)
        self._trajectory = [state]
        for step in range(self._steps):
            self._progress("recording the trajectory", step, self._steps)
            state = self._replay.evaluated_step(step, state)
            if not np.isfinite(state.latents).all():
                raise EngineError(
                    f"The latents hold NaN or infinite values after step {step + 1} of {self._steps}, without caching. "
                    "Check the model with adacorr-validate; in fp16 build it with --precision fp32."
                )
            self._trajectory.append(state)
        self._progress("recording the trajectory", self._steps, self._steps)
        if self._partials is not None:
            latents_of_steps = np.stack([state.latents for state in self._trajectory])
            carried = np.stack([state.carried for state in self._trajectory])
            self._partials.store("trajectory", {"latents": latents_of_steps, "carried": carried})

    def measure(self) -> None:
        """Walk the trajectory again; at each step, look at what skipping from here does."""
        reach = window_steps(self._replay.predictor)
        done = self._take_up(reach)
        for step in range(done, self._steps):
            self._progress("skipping from every step", step, self._steps)
            if step > 0:
                self._measure_skips(step)
            self._evaluate(step)
            self._window.pop(step - reach, None)
            self._outputs.pop(step - reach, None)
            self._first_inputs.pop(step - reach, None)
            if self._partials is not None and (step + 1) % max(1, self._steps // _STORED) == 0:
                self._partials.store("measured", {**self._found.arrays(), "done": np.asarray(step + 1)})
        self._progress("skipping from every step", self._steps, self._steps)

    def _take_up(self, reach: int) -> int:
        """Return how many steps an interrupted run has measured, with the last evaluations before it at hand again."""
        if self._partials is None:
            return 0
        stored = self._partials.load("measured", {**self._found.arrays(), "done": np.asarray(0)})
        if stored is None or not 0 < (done := int(stored.pop("done"))) <= self._steps:
            return 0
        self._found = SkipMeasurements.from_arrays(stored)
        for step in range(max(0, done - reach), done):
            self._evaluate(step, measures=False)
        return done

    def _measure_skips(self, step: int) -> None:
        """Skip from `step` on, for every gap, and see how far the latents stray from the trajectory."""
        count = min(MAX_SKIPPED, self._steps - step)
        for gap in range(1, self._gaps + 1):
            evaluations = self._evaluations(step - 1, gap)
            if evaluations is None:
                continue
            self._replay.fill(self._predicted_from(evaluations))
            for skipped, state in enumerate(self._replay.skipped_run(step, count, self._trajectory[step]), start=1):
                images = self._skip_errors(step, step + skipped, state, evaluations)
                self._found.skip_errors[step, gap - 1, skipped - 1] = geometric_mean(images)
                if gap == min(_TYPICAL, self._gaps) and skipped == _TYPICAL:
                    if np.isfinite(images).all():
                        self._found.skip_images[step] = images
                    self._measure_gain(step + skipped, state)

    def _skip_errors(self, first: int, after: int, state: State, evaluations: Sequence[int]) -> NDArray[np.float64]:
        """Return what skipping from `first` on leaves at `after`, or behind it once its evaluation has revised that."""
        if self._revises and after < self._steps:
            outputs = {at: self._outputs[at] for at in evaluations}
            state, after = self._replay.revised_step(after, state, first, self._trajectory[first], outputs), after + 1
        return self._image_errors(state.latents, after)

    def _predicted_from(self, evaluations: Sequence[int]) -> dict[int, Units]:
        """Return what the predictor reads of these evaluations, the newest of them."""
        return {at: self._window[at] for at in evaluations[-self._replay.predictor.history :]}

    def _measure_gain(self, step: int, state: State) -> None:
        """Run on from a strayed state to the end: the share of its latents' squared error that arrives there."""
        if step % self._gain_stride and step < self._steps - 2:
            return
        final = self._replay.evaluated_run(step, self._steps, state)
        arrived, strayed = self._image_errors(final, self._steps), self._image_errors(state.latents, step)
        gain = geometric_mean(arrived) / geometric_mean(strayed)
        if math.isfinite(gain):
            self._found.gains[step] = gain

    def _evaluate(self, step: int, *, measures: bool = True) -> None:
        """Evaluate a step of the trajectory; measure its offsets, its paper scores, and the probe's errors."""
        replay, residuals = self._replay, self._replay.residuals
        replay.start(step, self._trajectory[step])
        self._first_inputs[step] = replay.space.block_input(0).read()
        if measures:
            self._measure_offsets(step)
        units: Units = []
        entered: Tokens = self._first_inputs[step]  # the present span's input
        for block, slot in enumerate(replay.slots):
            if measures and step > 0:  # the reference holds the previous step's input
                branches = signals_of_branches(replay.space.input_signals(block, slot)(), self._batch)
                self._found.paper_scores[block, step] = max(paper_score(branch, 1.0) for branch in branches)
            if residuals is not None and residuals.starting_at(block) is not None:
                entered = replay.space.block_input(block).read()
            replay.space.evaluate(block, slot)
            if slot.reference is not None:
                slot.reference.copy_from(replay.space.block_input(block))
            units += self._kept(block, entered)
            if measures and block == self._probe_block and not replay.predictor.whole_step:
                self._measure_probe(step, units, entered)
        if replay.predictor.whole_step or self._revises:
            entry = replay.space.slots.output.next_entry
            replay.finish(step)
            self._outputs[step] = [replay.space.slots.output.ring[entry].read()]
        if replay.predictor.whole_step:
            units = self._outputs[step]
            if measures:
                self._measure_probe(step, units, entered)
        self._window[step] = units

    def _kept(self, block: int, entered: Tokens) -> Units:
        """Return what the predictor keeps once a block part was evaluated: its units, or its span's residual."""
        residuals, slot = self._replay.residuals, self._replay.slots[block]
        if residuals is None:
            return [] if self._replay.predictor.whole_step else [slot.ring[slot.next_entry].read()]
        if residuals.ending_at(block) is None:
            return []
        left = self._replay.space.block_output(block).read()
        return [(left.astype(np.float32) - entered.astype(np.float32)).astype(left.dtype)]

    def _measure_offsets(self, step: int) -> None:
        """Compare the first block's input with those of the steps before, and leave the previous one as reference."""
        slot = self._replay.slots[0]
        for age in range(min(step, MAX_SKIPPED), 0, -1):
            if slot.reference is not None:
                slot.reference.write(self._first_inputs[step - age])
            rows = self._replay.space.input_signals(0, slot)()
            each = [signals_of_branches(rows[[row]], 1)[0] for row in range(rows.shape[0])]
            self._found.offsets[step, age - 1] = max(robust_score(signals) for signals in each)

    def _measure_probe(self, step: int, fresh: Units, entered: Tokens) -> None:
        """Predict the probe from every pair of distance and gap, against what was just evaluated."""
        for gap, distance in itertools.product(range(1, self._gaps + 1), range(1, MAX_SKIPPED + 1)):
            evaluations = self._evaluations(step - distance, gap)
            if evaluations is None:
                continue
            rows = self._probe_rows(step, evaluations, fresh, entered)
            images = np.maximum(rows.reshape(-1, self._batch).max(axis=0), math.sqrt(FLOOR))
            if not (images <= MAX_MEASURE).all():
                continue
            self._found.probe_errors[step, gap - 1, distance - 1] = geometric_mean(images)
            if gap == min(_TYPICAL, self._gaps) and distance == _TYPICAL:
                self._found.probe_images[step] = images

    def _probe_rows(self, step: int, evaluations: Sequence[int], fresh: Units, entered: Tokens) -> NDArray[np.float64]:
        held = self._predicted_from(evaluations)
        if self._replay.predictor.whole_step:
            return self._replay.output_error(step, held, fresh[0])
        if self._replay.residuals is not None:
            self._replay.fill(held)
            return self._replay.span_error(len(fresh) - 1, step, entered)
        slot = self._replay.slots[self._probe_block]
        slot.fill([(at, units[self._probe_block]) for at, units in held.items()])
        return self._replay.block_error(self._probe_block, step)

    def _evaluations(self, last: int, gap: int) -> list[int] | None:
        """Return the evaluations that a skip or the probe reads when the last was at `last`, oldest first."""
        steps = [last - index * gap for index in range(_evaluations_read(self._replay.predictor))]
        return sorted(steps) if min(steps) >= 0 else None

    def _image_errors(self, latents: Latents, step: int) -> NDArray[np.float64]:
        """Squared error per element against the trajectory, (B,): of an image or a whole clip."""
        squares = np.square(latents.astype(np.float64) - self._trajectory[step].latents)
        return np.asarray(squares.mean(axis=tuple(range(1, squares.ndim))))

    def calibration(self, key: CalibrationKey) -> Calibration:
        """Put the measurements together."""
        residuals = self._replay.residuals
        if self._gaps == 1:
            self._found.spread_gaps()
        return Calibration(
            key=key,
            predictor=self._replay.predictor,
            spans=tuple(residuals.spans) if residuals is not None else (),
            images=self._batch,
            skip_costs=_nested(self._found.costs(delay=int(self._revises))),
            probe=Probe(block=self._probe_block, expected=_nested(self._found.probe_errors), slope=self._found.slope()),
            offset_limits=tuple(tuple(row) for row in bounded(self._found.offsets).tolist()),
            paper_floors=tuple(float(np.quantile(bounded(row[1:]), 0.75)) for row in self._found.paper_scores),
        )


def _probe_block(replay: Replay) -> int:
    """Return the block part after which the probe is measured: the last one of its span."""
    if replay.predictor.whole_step:
        return 0
    wanted = max(0, 3 * len(replay.slots) // 4 - 1)
    if replay.residuals is None:
        return wanted
    spans = replay.residuals.spans
    return next((span for span in spans if wanted < span.stop), spans[-1]).stop - 1


def _nested(cube: NDArray[np.float64]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(row) for row in rows) for rows in cube.tolist())
