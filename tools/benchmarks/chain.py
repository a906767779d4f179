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
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from chain_arms import RunArms, StepArms
from machine import cpu_model, say
from models import GUIDANCE, Opened, loaded_model
from round_figures import Figure, Times, fastest_times, figure, median_times, print_figures

from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.engines import Artefact, backend_by_name
from adacorr_deploy.exporters import monolithic_step_onnx
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime import SampleRequest

# --- Figures ---------------------------------------------------------------------------------------------------------


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
    return [figure(name, compute, rounds, goal) for name, compute, goal in table]


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
        median_seconds=median_times(rounds),
        fastest_seconds=fastest_times(rounds),
        figures=figures(rounds, len(model.units), request.steps, run_arms.rho),
    )


def print_report(report: Report) -> None:
    for name in ("machine", "model", "rho", "max_abs_difference_to_chain"):
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in getattr(report, name).items()))
    print(f"\n{'seconds':<50}{'median':>9}{'fastest':>9}")
    for arm, seconds in report.median_seconds.items():
        print(f"{arm:<50}{seconds:>9.4f}{report.fastest_seconds[arm]:>9.4f}")
    print()
    print_figures(report.figures)


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
