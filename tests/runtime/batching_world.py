"""A stage for the batching engine: requests that arrive, and are cancelled, at chosen moments of each other's runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from adacorr_deploy.caching.decisions import Action, Kept, Observation, Observed, Span, SpanCache
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.runtime import Pipeline, Progress, SampleRequest, SampleResult
from adacorr_deploy.runtime.batch_ticket import Listeners, Outcome, Ticket
from adacorr_deploy.runtime.batching import BatchingEngine
from adacorr_deploy.runtime.planned_run import planned_run
from tests.runtime.scripted import Script
from tests.runtime.spanned import SpanScript, at_random

BLOCKS = 3
PATIENCE_SECONDS = 60.0  # before a test that hangs fails


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request under a script of actions, and when it comes and goes: counted in steps that others finished."""

    labels: tuple[int, ...] = (1,)
    steps: int = 4
    guidance: float = 3.0
    seed: int = 0
    sampler: Sampler = Sampler.DDIM
    actions: tuple[Action, ...] = (Action.EVALUATE,)  # of block b at step s: the (s·BLOCKS + b)-th, over and over
    whole_steps: bool = False
    spans: tuple[Span, ...] = ()  # instead of a span for each part or the whole step
    watched: Observed = Observed.MODULATED  # of spans
    measures: bool = False
    revision: Revision = Revision.NONE
    history: int = 2
    arrives_at: int = 0
    cancelled_at: int | None = None

    @property
    def request(self) -> SampleRequest:
        return SampleRequest(
            self.labels, steps=self.steps, guidance=self.guidance, seed=self.seed, sampler=self.sampler
        )

    def script(self) -> Script:
        """Return a controller of its own."""
        if self.spans:
            return self._span_script()

        def choose(step: int, block: int) -> Action:
            action = self.actions[(step * BLOCKS + block) % len(self.actions)]
            return Action.REUSE if self.whole_steps and action is Action.CORRECT else action

        return Script(
            choose=choose,
            coefficients=(1.5, -0.5)[: self.history] if self.history > 1 else (1.0,),
            measures=self.measures,
            wants_signals=self.measures,
            whole_steps=self.whole_steps,
            revision=self._revision,
        )

    def _span_script(self) -> SpanScript:
        caching = [index for index, span in enumerate(self.spans) if span.cache is not SpanCache.NONE]
        return SpanScript(
            choose=at_random(self.actions, len(self.spans)),
            division=self.spans,
            coefficients=(1.5, -0.5)[: self.history] if self.history > 1 else (1.0,),
            watched={index: (self._observation(index), Observation(what=Observed.INPUT)) for index in caching},
            measures=self.measures,
            compares=self.measures,
            wants_signals=self.measures,
        )

    @property
    def _revision(self) -> Revision:
        return Revision.NONE if self.sampler.adds_noise(0.0) else self.revision  # fresh noise can't be drawn again

    def _observation(self, span: int) -> Observation:
        before_the_first = self.watched is Observed.RESIDUAL and not span
        return Observation(what=Observed.INPUT if before_the_first else self.watched, kept=Kept.STEP)

    def alone(self, pipeline: Pipeline) -> SampleResult:
        return pipeline.sample(self.request, self.script(), history=self.history)


@dataclass
class Stage:
    """Submits jobs to an engine when they are due, and gathers their outcomes."""

    engine: BatchingEngine
    jobs: Sequence[Job]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    steps_seen: dict[int, list[int]] = field(default_factory=dict)
    _tickets: dict[int, Ticket] = field(default_factory=dict)
    _finished_steps: int = 0
    _all_done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def play(self) -> dict[int, Outcome]:
        """Run all jobs, and return their outcomes by number."""
        with self._lock:
            self._submit_due()
        assert self._all_done.wait(PATIENCE_SECONDS), f"{len(self.outcomes)} of {len(self.jobs)} ended"
        return self.outcomes

    def _submit_due(self) -> None:
        idle = len(self.outcomes) == len(self._tickets)  # nobody is left to bring on the next arrival
        for number, job in enumerate(self.jobs):
            if number not in self._tickets and (job.arrives_at <= self._finished_steps or idle):
                idle = False
                run = planned_run(
                    self.engine._pipeline.manifest,
                    job.request,
                    job.script(),
                    history=job.history,
                )
                self._tickets[number] = self.engine.submit_planned(run, self._listeners(number))

    def _listeners(self, number: int) -> Listeners:
        def on_done(outcome: Outcome) -> None:
            with self._lock:
                assert number not in self.outcomes, "a request ends once"
                self.outcomes[number] = outcome
                self._submit_due()
                if len(self.outcomes) == len(self.jobs):
                    self._all_done.set()

        def on_step(step: int, steps: int, rho: float) -> None:
            with self._lock:
                self.steps_seen.setdefault(number, []).append(step)
                self._finished_steps += 1
                for other, ticket in self._tickets.items():
                    due = self.jobs[other].cancelled_at
                    if due is not None and due <= self._finished_steps:
                        ticket.cancel()
                self._submit_due()

        return Listeners(on_done=on_done, on_step=on_step)


@dataclass
class Box:
    """Waits for one outcome."""

    outcome: Outcome | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    def put(self, outcome: Outcome) -> None:
        assert self.outcome is None, "a request ends once"
        self.outcome = outcome
        self._done.set()

    def get(self) -> Outcome:
        assert self._done.wait(PATIENCE_SECONDS), "no outcome"
        assert self.outcome is not None
        return self.outcome


def submit(
    engine: BatchingEngine, job: Job, *, on_step: Progress | None = None, deadline: float | None = None
) -> tuple[Ticket, Box]:
    """Submit one job, and return its ticket and where its outcome comes."""
    box = Box()
    run = planned_run(engine._pipeline.manifest, job.request, job.script(), history=job.history)
    listeners = Listeners(on_done=box.put, on_step=on_step)
    return engine.submit_planned(run, listeners, deadline=deadline), box
