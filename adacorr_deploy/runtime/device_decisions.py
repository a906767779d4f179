"""A request whose blocks the GPU decides by itself: the host queues its steps, and reads what happened at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.block_rules import BlockRule
from adacorr_deploy.caching.decisions import Action, Decision
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.plugins.decision_kernels import CASES, NEVER, REASONS, Verdict
from adacorr_deploy.runtime.denoise import LatentsObserver, Progress, check_finite, stop_if_cancelled
from adacorr_deploy.runtime.device_steps import DecidedSteps, verdicts
from adacorr_deploy.runtime.pipeline import Pipeline, SampleResult
from adacorr_deploy.runtime.planned_run import PlannedRun
from adacorr_deploy.runtime.request import draws_of_steps
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.trace import Branch, Trace
from adacorr_deploy.runtime.workspace import Reading, Workspace

STEPS_AHEAD: Final = 2  # that are queued beyond the one that has finished, where somebody watches the run


def sample_decided_on_device(
    pipeline: Pipeline,
    run: PlannedRun,
    rules: Sequence[BlockRule],
    *,
    fresh_gates: bool,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    on_latents: LatentsObserver | None = None,
) -> SampleResult:
    """Denoise one batch in graphs that decide while they run.

    The host waits for the GPU once, at the end. With `progress` or `cancelled` it also keeps within two steps of it:
    what is queued can't be taken back, so a cancelled request still runs that far.

    Args:
        pipeline: An open bundle.
        run: The request; its controller is not asked.
        rules: Of each block part.
        fresh_gates: See `DecidedSteps`.
        progress: Called for each finished step.
        cancelled: Asked before each step is queued; True ends the request.
        on_latents: Given a host copy of the latents after each step, for which every step then waits.

    Raises:
        SamplingCancelledError: If `cancelled` returned True.
        EngineError: If the backend can't decide on the device, an engine fails, or the latents become NaN.
    """
    with pipeline.lease(run.size, references=lambda block: 1) as (space, slots):
        decided = _steps_of(pipeline, space, slots, run, fresh_gates)
        started = time.perf_counter()
        space.prepare(run.request, run.table, run.request.latents)
        decided.begin(rules)
        queue = _Queue(
            space=space, decided=decided, run=run, progress=progress, cancelled=cancelled, on_latents=on_latents
        )
        try:
            latents, launches, records = queue.sample()
        except BaseException:
            with suppress(EngineError):  # of the same failure
                decided.count(decided.launches()())
            raise
        decided.count(launches)
        check_finite(latents, run.request.steps - 1, run.request.steps)
        trace = _trace_of(run, verdicts(records, launches))
        return SampleResult(
            latents=latents,
            trace=trace,
            launches=int(launches.sum()),
            rho=trace.rho,
            seconds=time.perf_counter() - started,
            steps=run.request.steps,
        )


def _steps_of(
    pipeline: Pipeline, space: Workspace, slots: Sequence[CacheSlot], run: PlannedRun, fresh_gates: bool
) -> DecidedSteps:
    """Return the graphs of a workspace, made by the first request that needs them."""
    kept = space.decided_steps
    if fresh_gates not in kept:
        kept[fresh_gates] = DecidedSteps(
            pipeline.backend,
            space,
            slots,
            steps=run.size.steps,
            images=run.size.batch,
            fresh_gates=fresh_gates,
        )
    return kept[fresh_gates]


@dataclass(slots=True, kw_only=True)
class _Queue:
    """One request's steps on their way to the GPU."""

    space: Workspace
    decided: DecidedSteps
    run: PlannedRun
    progress: Progress | None
    cancelled: Callable[[], bool] | None
    on_latents: LatentsObserver | None
    _unfinished: deque[tuple[int, Reading]] = field(default_factory=deque)  # steps, and the evaluations up to them

    def sample(self) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Return the final latents, the evaluations that ran, (L, 1), and the trace, (S, L, 5)."""
        steps = self.run.request.steps
        for step, noise in enumerate(draws_of_steps(self.run.table)):
            stop_if_cancelled(self.cancelled, step, steps)
            self.space.begin_step(step, noise)
            self.decided.run(step)
            if self.progress is not None or self.cancelled is not None:
                self._unfinished.append((step, self.decided.launches()))
                self._follow(STEPS_AHEAD)
            if self.on_latents is not None:
                self.on_latents(step, self.space.read_latents(step))
        launches, trace = self.decided.launches(), self.decided.trace()
        latents = self.space.read_latents(steps - 1)  # the wait for all of it
        self._follow(0)
        return latents, np.asarray(launches(), dtype=np.int64), np.asarray(trace(), dtype=np.int64)

    def _follow(self, ahead: int) -> None:
        """Wait until no more than `ahead` steps are unfinished, and report the others."""
        while len(self._unfinished) > ahead:
            step, reading = self._unfinished.popleft()
            launches = reading()
            if self.progress is not None:
                possible = (step + 1) * len(launches)
                self.progress(step + 1, self.run.request.steps, 1 - int(launches.sum()) / possible)


def _trace_of(run: PlannedRun, decisions: Sequence[Sequence[Verdict]]) -> Trace:
    trace = Trace(run.request.steps, run.model.block_names, tuple(Branch)[: run.request.branches])
    for step, blocks in enumerate(decisions):
        for block, verdict in enumerate(blocks):
            decision = Decision(
                action=Action(CASES[verdict.action]),
                reason=REASONS[verdict.reason],
                score=verdict.score,
                weight=verdict.weight,
            )
            trace.record(step, block, decision, None if verdict.age == NEVER else verdict.age)
    return trace
