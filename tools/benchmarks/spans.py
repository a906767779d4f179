"""What spans above and below a block cost: a range reused, kept and observed, and blocks cut into halves.

    python tools/benchmarks/spans.py [--size S/2|B/2|…|demo|tiny] [--batch 8] [--rounds 9] [--json]

As in chain.py, every round times every arm once, in turns, and each figure is made of times of one round. The range is
all block parts; `÷ evaluated` is by the time of the chain of blocks on the same input.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from machine import cpu_model, say
from models import GUIDANCE, HISTORY, Opened, loaded_model, static_controller, timed
from numpy.typing import NDArray
from round_figures import Figure, Times, figure, median_times, print_figures

from adacorr_deploy.caching.controllers import Run
from adacorr_deploy.caching.decisions import Observed, Prediction
from adacorr_deploy.caching.predictors import PredictorKind
from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.core.specs import HALVES
from adacorr_deploy.engines import Backend, backend_by_name
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.planned_run import planned_run
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.workspace import Workspace

REPEATS: Final = 5  # of launches that are too short to be timed alone
STEPS: Final = 4


FIGURES: Final[Mapping[str, tuple[str, str]]] = {
    "chain of halves ÷ chain of blocks": ("halves", "blocks"),
    "range reused, held ÷ evaluated": ("reuse_1", "blocks"),
    "range reused, extrapolated ÷ evaluated": ("reuse_2", "blocks"),
    "residual kept ÷ evaluated": ("keep", "blocks"),
    "input observed ÷ evaluated": ("observe_input", "blocks"),
    "modulated input observed ÷ evaluated": ("observe_modulated", "blocks"),
}


class Chain:
    """All block parts of a bundle as one range, in a workspace whose slot holds what an extrapolation needs."""

    def __init__(self, space: Workspace, slots: Sequence[CacheSlot]) -> None:
        self.space = space
        self._slots = slots
        self._slot = space.slots.spans[0]
        for step in range(HISTORY):
            space.embed(step)
            self.evaluate()
            space.spans.keep(0)
            self._slot.record(step)
        space.embed(HISTORY)

    @classmethod
    @contextmanager
    def of(cls, pipeline: Pipeline, request: SampleRequest) -> Iterator[Chain]:
        """Lend a pipeline's workspace, prepared."""
        run = Run(steps=STEPS, blocks=len(pipeline.manifest.model.units))
        controller = static_controller(PredictorKind.RESIDUAL_TAYLOR, run, frozenset(range(STEPS)))
        planned = planned_run(pipeline.manifest, request, controller, history=HISTORY)
        with pipeline.lease(planned.size, references=lambda span: 1) as (space, slots):
            planned.start(space, slots, progress=None, cancelled=None)
            yield cls(space, slots)

    def evaluate(self) -> None:
        for part, slot in enumerate(self._slots):
            self.space.evaluate(part, slot)

    def output(self) -> NDArray[np.float32]:
        return np.asarray(self.space.block_output(len(self._slots) - 1).read(), dtype=np.float32)

    def reuse(self, evaluations: int) -> None:
        coefficients = (2.0, -1.0)[:evaluations] if evaluations > 1 else (1.0,)
        prediction = Prediction(coefficients=coefficients, gate_steps=(HISTORY,) * evaluations)
        self.space.spans.reuse(0, self._slot.window(prediction))

    def observe(self, what: Observed) -> None:
        observed = self.space.spans.observed(0, what)
        self.space.compare(("benchmark", what.value), observed, self._slot.kept_reference)()

    def times(self) -> Times:
        """Time each launch over the range."""
        arms: dict[str, Callable[[], None]] = {
            "reuse_1": lambda: self.reuse(1),
            "reuse_2": lambda: self.reuse(2),
            "keep": lambda: self.space.spans.keep(0),
            "observe_input": lambda: self.observe(Observed.INPUT),
            "observe_modulated": lambda: self.observe(Observed.MODULATED),
        }
        times = {"blocks": timed(self.evaluate)}
        for name, work in arms.items():
            times[name] = timed(partial(_repeated, work)) / REPEATS
        return times


def _repeated(work: Callable[[], None]) -> None:
    for _ in range(REPEATS):
        work()


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    machine: Mapping[str, str | float]
    model: Mapping[str, str | int]
    halves_max_abs_difference: float
    halves_equal_bits: bool
    median_seconds: Times
    figures: Sequence[Figure]


def measure(args: argparse.Namespace, folder: Path) -> Report:
    """Build the model twice, in blocks and in halves, and measure both; one round more warms up."""
    loaded, backend = loaded_model(args.size), backend_by_name("onnxruntime")
    rounds: list[Times] = []
    with ExitStack() as resources:
        blocks, halves = (
            _pipeline(loaded, backend, folder / name, BuildOptions(segment=segment), resources)
            for name, segment in (("blocks", 1), ("halves", HALVES))
        )
        model = blocks.manifest.model
        labels = tuple(index % model.num_classes for index in range(args.batch))
        request = SampleRequest(labels, steps=STEPS, guidance=GUIDANCE)
        chain, cut = (resources.enter_context(Chain.of(pipeline, request)) for pipeline in (blocks, halves))
        for index in range(args.rounds + 1):
            say(f"round {index} of {args.rounds}" if index else "warming up")
            rounds.append(chain.times() | {"halves": timed(cut.evaluate)})
        chain.evaluate()
        difference = float(np.abs(chain.output() - cut.output()).max())
    return Report(
        machine={"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0]},
        model={
            "name": loaded.name,
            "blocks": len(model.units),
            "width": model.width,
            "tokens": model.tokens,
            "rows": request.batch * request.branches,
        },
        halves_max_abs_difference=difference,
        halves_equal_bits=difference == 0.0,
        median_seconds=median_times(rounds[1:]),
        figures=[figure(name, partial(_ratio, arms), rounds[1:]) for name, arms in FIGURES.items()],
    )


def _pipeline(
    loaded: LoadedModel, backend: Backend, path: Path, options: BuildOptions, resources: ExitStack
) -> Pipeline:
    say(f"building {path.name}")
    return Opened.of(build_bundle(loaded, path, backend, options), backend, resources).pipeline()


def _ratio(arms: tuple[str, str], times: Times) -> float:
    arm, base = arms
    return times[arm] / times[base]


def print_report(report: Report) -> None:
    for name in ("machine", "model"):
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in getattr(report, name).items()))
    same = "the same bits" if report.halves_equal_bits else f"{report.halves_max_abs_difference:.2e} apart at most"
    print(f"tokens after the chain of halves and the chain of blocks: {same}\n")
    print_figures(report.figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", help="DiT size and patch, demo or tiny (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images; rows are twice as many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="beside one that warms up (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    if args.batch < 1 or args.rounds < 1:
        parser.error("--batch and --rounds are at least 1")
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
