"""What the chain of parts costs: against one graph, against PyTorch, and against the ideal of skipped blocks.

    python tools/benchmarks/chain.py [--size S/2|B/2|L/4|…|demo|tiny] [--batch 8] [--rounds 7] [--steps 10]
                                     [--keep BUNDLE] [--json]

Everything is measured in one process and in turns: each round times every arm once, and every figure is made of times
of the same round, so that a drift of the machine's speed touches all alike. Weights are random (but the demo's), which
changes no time. Run it on a quiet machine, and read the load that it prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from machine import cpu_model, say
from models import (
    GUIDANCE,
    HISTORY,
    PAUSE_SECONDS,
    Opened,
    loaded_model,
    monolith_buffers,
    prepare,
    static_controller,
    timed,
)

from adacorr_deploy.caching.controllers import Run, controller_for_policy
from adacorr_deploy.caching.decisions import Controller, Prediction
from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.caching.predictors import PredictorKind
from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.engines import Artefact, Buffer, Launch, Session, backend_by_name
from adacorr_deploy.exporters import LoadedModel, monolithic_step_onnx
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.quality.diffusers_schedulers import scheduler_for_run
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.workspace import Workspace

EXTRAPOLATIONS: Final = 10  # in one timing: a single one is too short

Times = dict[str, float]  # seconds by arm, of one round


# --- Arms ------------------------------------------------------------------------------------------------------------


def run_size(request: SampleRequest, *, history: int = 0, output_history: int = 0) -> RunSize:
    return RunSize(
        batch=request.batch,
        branches=request.branches,
        steps=request.steps,
        history=history,
        output_history=output_history,
    )


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
        with self._pipeline.lease(run_size(self._request), references=lambda block: 0) as (space, slots):
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
        size = run_size(self._request, history=HISTORY)
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
        size = run_size(self._request, output_history=HISTORY)
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


# --- Figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure made of the times of one round.

    Attributes:
        median: Over the rounds.
        low: The lowest of them.
        high: The highest of them.
        of_fastest: The figure of each arm's fastest time.
        goal: What `median` is held to, and whether it reaches it; None where nothing was asked.
    """

    name: str
    median: float
    low: float
    high: float
    of_fastest: float
    goal: str | None
    met: bool | None


def figures(rounds: Sequence[Times], blocks: int, steps: int, rho: Mapping[str, float]) -> list[Figure]:
    """Return every figure; `blocks` is the number of block parts."""

    def block_share(t: Times) -> float:
        return t["blocks"] * steps / t["loop_none"]

    def speedup(t: Times, *, run: str, clock: str) -> float:
        return t[f"{clock}_none"] / t[f"{clock}_{run}"]

    def efficiency(t: Times, *, run: str, clock: str) -> float:
        return speedup(t, run=run, clock=clock) * (1 - rho[run] * min(block_share(t), 1.0))

    def bookkeeping(t: Times) -> float:
        return (t["run_none"] - t["bare_launches"]) / t["run_none"]

    fastest = {arm: min(times[arm] for times in rounds) for arm in rounds[0]}
    table: list[tuple[str, Callable[[Times], float], str | None]] = [
        ("chain ÷ monolith", lambda t: t["chain_step"] / t["monolith_step"], "<= 1.05"),
        ("chain ÷ diffusers", lambda t: t["chain_step"] / t["diffusers_step"], "<= 1.00"),
        ("reused block ÷ evaluated block", lambda t: t["reused_blocks"] / t["blocks"], None),
        ("signals of a block ÷ evaluated block", lambda t: t["signals_of_blocks"] / t["blocks"], None),
        ("extrapolated step ÷ evaluated step", lambda t: t["extrapolated_step"] / t["chain_step"], None),
        ("share of blocks in uncached time", block_share, None),
        ("bookkeeping ÷ uncached time", bookkeeping, "<= 0.02"),
        (  # `robust` measures one block a step
            "signals and bookkeeping ÷ uncached time",
            lambda t: bookkeeping(t) + t["signals_of_blocks"] / blocks / t["chain_step"],
            "<= 0.02",
        ),
    ]
    for run, label in (("output", "whole steps, output-taylor"), ("blocks", "blocks, gated-taylor")):
        table += [
            (f"speed-up, {label}", partial(speedup, run=run, clock="run"), None),
            (f"efficiency, {label}", partial(efficiency, run=run, clock="run"), ">= 0.95"),
            (f"efficiency of the loop, {label}", partial(efficiency, run=run, clock="loop"), None),
        ]
    return [_figure(name, compute, goal, rounds, fastest) for name, compute, goal in table]


def _figure(
    name: str, compute: Callable[[Times], float], goal: str | None, rounds: Sequence[Times], fastest: Times
) -> Figure:
    values = [compute(times) for times in rounds]
    median = statistics.median(values)
    met = None
    if goal is not None:
        sign, _, limit = goal.partition(" ")
        met = median <= float(limit) if sign == "<=" else median >= float(limit)
    return Figure(
        name=name,
        median=median,
        low=min(values),
        high=max(values),
        of_fastest=compute(fastest),
        goal=goal,
        met=met,
    )


# --- The script ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str | int | float]:
    packages = ("torch", "diffusers", "onnxruntime", "numpy")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    machine: Mapping[str, str | int | float]
    model: Mapping[str, str | int]
    rounds: int
    rho: Mapping[str, float]
    max_abs_difference_to_chain: Mapping[str, float]
    median_seconds: Times
    fastest_seconds: Times
    figures: Sequence[Figure]


def measure(args: argparse.Namespace, folder: Path) -> Report:
    """Build the model's parts and its one graph, and measure them; one round more warms up."""
    say(f"building {args.size}")
    before = machine()
    loaded, backend = loaded_model(args.size), backend_by_name("onnxruntime")
    bundle = build_bundle(loaded, args.keep or folder / "bundle", backend, BuildOptions())
    step_spec = monolithic_step_onnx(loaded, folder)
    model = bundle.manifest.model
    labels = tuple(index % model.num_classes for index in range(args.batch))
    request = SampleRequest(labels, steps=args.steps, guidance=GUIDANCE)
    with ExitStack() as resources:
        opened = Opened.of(bundle, backend, resources)
        monolith = backend.open(Artefact(path=folder / f"{step_spec.name}.onnx"), step_spec)
        resources.callback(monolith.close)
        step_arms, run_arms = StepArms(opened, loaded, monolith, request), RunArms(opened, request)
        rounds = []
        for index in range(args.rounds + 1):
            say(f"round {index} of {args.rounds}" if index else "warming up")
            rounds.append(step_arms() | run_arms())
    rounds = rounds[1:]
    return Report(
        machine=before,
        model={
            "name": loaded.name,
            "blocks": len(model.units),
            "width": model.width,
            "tokens": model.tokens,
            "batch": request.batch,
            "rows": request.batch * request.branches,
            "steps": request.steps,
        },
        rounds=args.rounds,
        rho=run_arms.rho,
        max_abs_difference_to_chain=step_arms.differences,
        median_seconds={arm: statistics.median(times[arm] for times in rounds) for arm in rounds[0]},
        fastest_seconds={arm: min(times[arm] for times in rounds) for arm in rounds[0]},
        figures=figures(rounds, len(model.units), request.steps, run_arms.rho),
    )


def print_report(report: Report) -> None:
    for name in ("machine", "model", "rho", "max_abs_difference_to_chain"):
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in getattr(report, name).items()))
    print(f"\n{'seconds':<50}{'median':>9}{'fastest':>9}")
    for arm, seconds in report.median_seconds.items():
        print(f"{arm:<50}{seconds:>9.4f}{report.fastest_seconds[arm]:>9.4f}")
    print(f"\n{'figures':<50}{'median':>9}{'low':>9}{'high':>9}{'fastest':>9}  goal")
    for each in report.figures:
        numbers = "".join(f"{value:>9.4f}" for value in (each.median, each.low, each.high, each.of_fastest))
        verdict = "" if each.goal is None else f"  {each.goal}  {'met' if each.met else 'NOT met'}"
        print(f"{each.name:<50}{numbers}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", help="DiT size and patch, demo or tiny (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images; rows are twice as many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="beside one that warms up (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of whole runs, even (default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="leave the bundle here, for tools/benchmarks/memory.py")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    if args.batch < 1 or args.rounds < 1 or args.steps < 6 or args.steps % 2:
        parser.error("--batch and --rounds are at least 1, --steps is even and at least 6")
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = measure(args, Path(folder))
        except AdaCorrError as error:
            parser.exit(2, f"error: {error}\n")
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        print_report(report)


if __name__ == "__main__":
    main()
