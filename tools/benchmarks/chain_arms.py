"""What chain.py times: one step as a chain, as one graph and in PyTorch; whole runs; what a reuse costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from models import (
    HISTORY,
    PAUSE_SECONDS,
    Opened,
    monolith_buffers,
    prepare,
    static_controller,
    timed,
)
from round_figures import Times

from adacorr_deploy.caching.controllers import Run, controller_for_policy
from adacorr_deploy.caching.decisions import Controller, Prediction
from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.caching.predictors import PredictorKind
from adacorr_deploy.engines import Buffer, Launch, Session
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.quality.diffusers_schedulers import scheduler_for_run
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.workspace import Workspace

EXTRAPOLATIONS: Final = 10  # in one timing: a single one is too short


class StepArms:
    """One uncached denoising step: the chain, the same as one graph, and diffusers in PyTorch."""

    def __init__(self, opened: Opened, loaded: LoadedModel, monolith: Session, request: SampleRequest) -> None:
        self._pipeline = opened.pipeline()
        self._loaded = loaded
        self._monolith = monolith
        self._launch: Launch | None = None
        self._request = request
        tokens = opened.bundle.manifest.model.tokens
        self._scheduler = scheduler_for_run(loaded.schedule, request, tokens=tokens)
        self.differences: dict[str, float] = {}  # largest between the chain's latents and the others'

    def __call__(self) -> Times:
        size = RunSize.of(self._request, history=0, whole_steps=False)
        with self._pipeline.lease(size, references=lambda block: 0) as (space, slots):
            prepare(self._pipeline, space, self._request)
            times = _chain_times(space, slots)
            if self._launch is None:
                self._launch = self._monolith.bind(self._monolith_buffers(space))
            times["monolith_step"] = timed(self._launch.run)
            start = torch.from_numpy(np.asarray(space.image.latents[0].read(), dtype=np.float32))
            chained, whole = space.read_latents(0), space.image.scratch.read()
        eager: list[torch.Tensor] = []
        times["diffusers_step"] = timed(lambda: eager.append(self._diffusers_step(start)))
        others = {"monolith": whole, "diffusers": eager[0].numpy()}
        self.differences = {name: float(np.abs(chained - other).max()) for name, other in others.items()}
        return times

    def _monolith_buffers(self, space: Workspace) -> dict[str, Buffer]:
        return monolith_buffers(self._monolith.spec, space, space.image.latents[0], space.image.scratch)

    @torch.inference_mode()
    def _diffusers_step(self, latents: torch.Tensor) -> torch.Tensor:
        """As diffusers' DiTPipeline does a step."""
        request, timestep = self._request, self._scheduler.timesteps[0]
        rows = torch.cat([latents] * request.branches)
        labels = torch.from_numpy(request.rows(self._pipeline.manifest.model.num_classes))
        output = self._loaded.model.predict(rows, timestep.expand(len(rows)), {"labels": labels})
        conditional, unconditional = output.chunk(2)
        guided = unconditional + request.guidance * (conditional - unconditional)
        result: torch.Tensor = self._scheduler.step(guided, timestep, latents).prev_sample
        return result


def _chain_times(space: Workspace, slots: Sequence[CacheSlot]) -> Times:
    time.sleep(PAUSE_SECONDS)
    started = time.perf_counter()
    space.embed(0)
    embedded = time.perf_counter()
    for block, slot in enumerate(slots):
        space.evaluate(block, slot)
    evaluated = time.perf_counter()
    space.head(0, None)
    return {"chain_step": time.perf_counter() - started, "blocks": evaluated - embedded}


class RunArms:
    """Whole runs: uncached, its bare launches, and every second step by either predictor; and what a reuse costs."""

    def __init__(self, opened: Opened, request: SampleRequest) -> None:
        self._opened = opened
        self._request = request
        self._pipelines = {name: opened.pipeline() for name in ("none", "output", "blocks")}
        self._bare: Sequence[Launch] = ()
        self.rho: dict[str, float] = {}

    def __call__(self) -> Times:
        times = self._reuse_times() | self._extrapolation_times() | self._run_times("none")
        times["bare_launches"] = timed(self._run_bare)
        return times | self._run_times("output") | self._run_times("blocks")

    def _run_bare(self) -> None:
        for launch in self._bare:
            launch.run()

    def _run_times(self, name: str) -> Times:
        bound_before = len(self._opened.bound)
        controller, history = _controller(name, self._run_of(self._pipelines[name]))
        time.sleep(PAUSE_SECONDS)
        started = time.perf_counter()
        result = self._pipelines[name].sample(self._request, controller, history=history)
        seconds = time.perf_counter() - started
        if name == "none" and not self._bare:
            self._bare = _run_order(self._opened.bound[bound_before:], self._request.steps)
        self.rho[name] = result.rho
        return {f"run_{name}": seconds, f"loop_{name}": result.seconds}  # the loop clears no slots

    def _run_of(self, pipeline: Pipeline) -> Run:
        return Run(steps=self._request.steps, blocks=len(pipeline.manifest.model.units))

    def _reuse_times(self) -> Times:
        """Time the prediction and the signals of all blocks, over slots that hold two evaluations."""
        pipeline = self._pipelines["blocks"]
        size = RunSize.of(self._request, history=HISTORY, whole_steps=False)
        with pipeline.lease(size, references=lambda block: 1) as (space, slots):
            prepare(pipeline, space, self._request)
            for step in range(HISTORY):
                space.embed(step)
                for block, slot in enumerate(slots):
                    space.evaluate(block, slot)
                    slot.record(step)
                    if slot.reference is not None:
                        slot.reference.copy_from(space.block_input(block))
            space.embed(HISTORY)
            window = slots[0].window(_linear_prediction(HISTORY))

            def reuse() -> None:
                for block, slot in enumerate(slots):
                    space.reuse(block, slot, window)

            def measure_inputs() -> None:
                for block, slot in enumerate(slots):
                    space.input_signals(block, slot)()

            return {"reused_blocks": timed(reuse), "signals_of_blocks": timed(measure_inputs)}

    def _extrapolation_times(self) -> Times:
        """Time a step whose output is extrapolated, as the loop runs it."""
        pipeline = self._pipelines["output"]
        size = RunSize.of(self._request, history=HISTORY, whole_steps=True)
        with pipeline.lease(size, references=lambda block: 0) as (space, _):
            prepare(pipeline, space, self._request)
            for step in range(HISTORY):  # without its blocks: the outputs' values don't matter
                space.embed(step)
                space.head(step, None)
                space.slots.output.record(step)
            window = space.slots.output.window(_linear_prediction(HISTORY))

            def extrapolate() -> None:
                for _ in range(EXTRAPOLATIONS):
                    space.embed(HISTORY)
                    space.extrapolate(HISTORY, None, window)

            return {"extrapolated_step": timed(extrapolate) / EXTRAPOLATIONS}


def _linear_prediction(step: int) -> Prediction:
    return Prediction(coefficients=(2.0, -1.0), gate_steps=(step, step))


def _controller(name: str, run: Run) -> tuple[Controller, int]:
    """Return a controller and the evaluations that its slots keep."""
    if name == "none":
        return controller_for_policy(PRESETS["none"], run, None), 0
    kind = PredictorKind.OUTPUT_TAYLOR if name == "output" else PredictorKind.GATED_TAYLOR
    # The first two, then every second but the last: just half, and each reuse extrapolates from two evaluations.
    evaluated = frozenset({0, *range(1, run.steps - 2, 2)})
    return static_controller(kind, run, evaluated), HISTORY


def _run_order(bound: Sequence[tuple[str, Launch]], steps: int) -> list[Launch]:
    """Return the launches of an uncached run in order, from those that its first run bound in that order.

    Bound are: condition, embed, blocks and head of step 0, then embed and head of step 1, whose latents change places.
    """
    by_part: dict[str, list[Launch]] = {}
    for name, launch in bound:
        by_part.setdefault(name, []).append(launch)
    (condition,), embeds, heads = by_part.pop("condition"), by_part.pop("embed"), by_part.pop("head")
    blocks = [launch for (launch,) in by_part.values()]
    order = [condition]
    for step in range(steps):
        order += [embeds[step % 2], *blocks, heads[step % 2]]
    return order
