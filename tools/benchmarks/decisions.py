"""What a policy's decisions cost the loop: every row of the table of policies, and each with AdaCorrection on top.

    python tools/benchmarks/decisions.py [--steps 50] [--blocks 28] [--runs 20] [--cpu-time] [--json]

Nothing is launched: controllers are driven as the loop drives them, on signals that wander at random, with a
calibration and a profile that are made up. One decision is everything that the loop asks of a controller for one span
at one step: whether signals are wanted, the decision, the prediction or the errors and changes. The goal is 0.1 ms.
A plan is solved once for a price and shared by all requests of a process; every run here is the same request, so that
the first one solves the plans, and its time stands by itself. On a machine that others use too, `--cpu-time` counts
what the deciding thread itself took of a processor, without its waiting for one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final

from machine import cpu_model, say

from adacorr_deploy.caching.calibration import Calibration, CalibrationKey, Probe, caching_spans
from adacorr_deploy.caching.controllers import Run, controller_for_policy
from adacorr_deploy.caching.decisions import Action, Controller, Signals, SlotHistory
from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.caching.profile import AffineMap, ChangePolynomial, LinearGate, Profile
from adacorr_deploy.core.errors import PolicyError

GOAL_MS: Final = 0.1
WIDTH: Final = 1152
REACH: Final = 6  # steps of a gap and of a skip, as calibration measures


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Times of one policy.

    Attributes:
        policy: Its name.
        decisions: Spans × steps of a run.
        mean_us: Microseconds per decision, the median over runs of their means.
        slowest_us: The slowest decision of the median run.
        first_run_ms: The whole first run, with its planning.
    """

    policy: str
    decisions: int
    mean_us: float
    slowest_us: float
    first_run_ms: float


def main() -> int:
    arguments = _parser().parse_args()
    rows = [measured(policy, arguments) for policy in policies()]
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return 0
    say(f"{cpu_model()}; {arguments.blocks} blocks, {arguments.steps} steps, {arguments.runs} runs")
    print(f"{'policy':30} {'decisions':>9} {'µs each':>8} {'slowest':>8} {'first run ms':>12}")
    for row in rows:
        print(f"{row.policy:30} {row.decisions:9} {row.mean_us:8.2f} {row.slowest_us:8.1f} {row.first_run_ms:12.1f}")
    worst = max(rows, key=lambda row: row.mean_us)
    print(f"goal {GOAL_MS} ms; the most is {worst.mean_us / 1000:.4f} ms, of {worst.policy}")
    return 0 if worst.mean_us / 1000 <= GOAL_MS else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--cpu-time", action="store_true", help="of the deciding thread, in place of wall-clock time")
    parser.add_argument("--json", action="store_true")
    return parser


def policies() -> Iterator[Policy]:
    """Yield every preset, and every one that takes it with AdaCorrection on top, in its modes."""
    for name, policy in PRESETS.items():
        yield policy
        for on_top in ("adacorrection@2", "paper-lazy", "paper-exact"):
            with suppress(PolicyError):
                yield policy_named(f"{name}+{on_top}")


def measured(policy: Policy, arguments: argparse.Namespace) -> Row:
    steps = policy.sampled_steps(arguments.steps)
    run = Run(steps=steps, blocks=arguments.blocks, elements=256 * WIDTH)
    made, profile = calibration(policy, run), profile_of(steps, arguments.blocks)
    means, slowest, first, signals = [], [], math.nan, wandering(steps)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    for index in range(arguments.runs + 1):
        controller = controller_for_policy(policy, run, made, profile)
        started = clock()
        times = drive(controller, steps, signals, clock)
        if index == 0:
            first = clock() - started
        else:
            means.append(statistics.fmean(times))
            slowest.append(max(times))
    return Row(
        policy=policy.name,
        decisions=steps * len(controller.spans),
        mean_us=1e6 * statistics.median(means),
        slowest_us=1e6 * statistics.median(slowest),
        first_run_ms=1e3 * first,
    )


def drive(
    controller: Controller, steps: int, signals: Sequence[Sequence[Signals]], clock: Callable[[], float]
) -> list[float]:
    """Decide every span of every step as the loop does, and return the seconds of each by the clock."""
    histories = [SlotHistory(capacity=3) for _ in controller.spans]
    watched = [len(controller.observations(span)) for span in range(len(histories))]
    times = []
    for step in range(steps):
        for span, history in enumerate(histories):
            started = clock()
            wanted = controller.needs_signals(step, span, history) if history.steps else [False] * watched[span]
            decision = controller.decide(step, span, history, [signals[step] if asked else None for asked in wanted])
            if decision.action is Action.REUSE:
                controller.prediction(step, span, history)
            else:
                _evaluate(controller, step, span, history, signals[step])
            times.append(clock() - started)
    return times


def _evaluate(controller: Controller, step: int, span: int, history: SlotHistory, signals: Sequence[Signals]) -> None:
    if history.steps and controller.measures_error(step, span, history):
        controller.prediction(step, span, history)
        controller.record_error(step, span, signals[0].relative_offset)
    if history.steps and controller.observes_change(step, span, history):
        controller.record_change(step, span, signals)
    history.record(step)


def wandering(steps: int) -> list[list[Signals]]:
    """Signals of both branches, per step: changes of 1 to 30 %."""
    draw = random.Random(0)  # noqa: S311  no secret
    return [[_signals(math.exp(draw.uniform(math.log(0.01), math.log(0.3)))) for _ in range(2)] for _ in range(steps)]


def _signals(change: float) -> Signals:
    return Signals(
        relative_offset=change,
        relative_offset_p95=change,
        spatial_change=0.1 * change,
        paper_temporal=change,
        paper_spatial=0.1,
        change_l1=change,
        reference_l1=1.0,
        change_square=change**2,
        reference_square=1.0,
        probe=0.1 - change,
    )


def calibration(policy: Policy, run: Run) -> Calibration:
    """Make one up: skipping k steps costs k²."""
    steps, spans = run.steps, caching_spans(policy.spans_of(run))
    costs = tuple(1e-4 * k * k for k in range(1, REACH + 1))
    return Calibration(
        key=_key(steps),
        predictor=policy.predictor,
        spans=spans,
        images=1,
        skip_costs=((costs,) * REACH,) * steps,
        probe=Probe(block=0, expected=(((0.1,) * REACH,) * REACH,) * steps, slope=1.0),
        offset_limits=((1.0,) * REACH,) * steps,
        paper_floors=(0.1,) * run.blocks,
    )


def profile_of(steps: int, blocks: int) -> Profile:
    """Make one up: errors grow by 0.05 per step of age."""
    table = tuple(
        tuple(0.05 * age if age <= step else math.inf for age in range(1, REACH + 1)) for step in range(steps)
    )
    vector = (0.01,) * WIDTH
    return Profile(
        key=_key(steps),
        images=1,
        output_change=ChangePolynomial(coefficients=(1.0, 1.0, 1.0, 0.5, 0.01), low=0.0, high=1.0),
        magnitude_ratios=(1.0, *(0.98,) * (steps - 1)),
        unit_errors={"attention": table, "mlp": table},
        part_errors=(table,) * blocks,
        affine=tuple(AffineMap(first=part, stop=part + 1, scale=vector, shift=vector) for part in range(blocks)),
        gates=(LinearGate(weights=vector, bias=0.0),) * blocks,
    )


def _key(steps: int) -> CalibrationKey:
    return CalibrationKey(
        checkpoint_sha256="0" * 64, sampler="ddim", steps=steps, guidance=4.0, latent_shape=(4, 32, 32)
    )


if __name__ == "__main__":
    sys.exit(main())
