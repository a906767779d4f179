"""Do validity curves tell the error of a reuse better than the calibrated table times the request's difficulty?

    python tools/benchmarks/validity.py demo.bundle --images 32

Of uncached runs, the error of predicting the model's output from earlier evaluations is known for every step, age and
image, and so is what could have foretold it: how far the first block's input had moved (√Ŝ), and how wrong the
prediction at the evaluation before had been. Half of the images fit, the other half judge: the share of the variance of
the logarithm of the error that each forecast explains, within steps (where a schedule knows the same of every request).

    table        the mean at this step and age: what a schedule knows
    difficulty   the table, times (measured ÷ expected at the last evaluation) to a fitted power: `robust`
    curve        a monotone curve of √Ŝ for each age and each of five ranges of steps (METHOD §3)
    curve, step  a monotone curve of √Ŝ relative to its mean at this step and age, times the table
    both         difficulty and relative √Ŝ, least squares in the logarithms
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.polynomials import polynomial_coefficients
from adacorr_deploy.caching.scores import robust_score
from adacorr_deploy.core.samplers import sampler_table
from adacorr_deploy.plugins import oracle
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.observer import signals_of_branches

AGES: Final = (1, 2, 3, 4)
GAP: Final = 2  # steps between the two evaluations that a prediction reads
BINS: Final = 5
SEED: Final = 4_000_000
Wide = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Logarithms, (S, ages, B); NaN where a run has not begun early enough."""

    errors: Wide
    offsets: Wide


def runs(pipeline: Pipeline, args: argparse.Namespace) -> Iterator[tuple[list[NDArray[np.float32]], list[Wide]]]:
    """Yield of each batch the first block's inputs (R, N, D) and the guided outputs (B, …), by step."""
    classes = pipeline.manifest.model.num_classes
    for first in range(0, args.images, args.batch):
        labels = tuple(image % classes for image in range(first, min(first + args.batch, args.images)))
        request = SampleRequest(labels, steps=args.steps, guidance=args.guidance, seed=SEED + first)
        table = sampler_table(pipeline.manifest.schedule, request.sampler, request.steps)
        size = RunSize.of(request, history=0, whole_steps=False)
        inputs, outputs = [], []
        with pipeline.lease(size, references=lambda block: 0) as (space, slots):
            space.prepare(request, table, None)
            for step in range(args.steps):
                space.embed(step)
                inputs.append(np.asarray(space.block_input(0).read(), np.float32))
                for block, slot in enumerate(slots):
                    space.evaluate(block, slot)
                entry = space.slots.output.next_entry
                space.head(step, None)
                outputs.append(np.asarray(space.slots.output.ring[entry][0].read(), np.float64))
        yield inputs, outputs


def recorded(pipeline: Pipeline, args: argparse.Namespace) -> Recorded:
    errors, offsets = [], []
    for inputs, outputs in runs(pipeline, args):
        batch = len(outputs[0])
        error = np.full((args.steps, len(AGES), batch), np.nan)
        offset = np.full_like(error, np.nan)
        for step, (index, age) in itertools.product(range(args.steps), enumerate(AGES)):
            last = step - age
            if last - GAP < 0:
                continue
            newest, oldest = polynomial_coefficients(step, (last, last - GAP))
            predicted = newest * outputs[last] + oldest * outputs[last - GAP]
            error[step, index] = oracle.output_error(predicted, outputs[step])
            rows = oracle.signals(inputs[step], inputs[last])
            images = rows.reshape(-1, batch, rows.shape[1])
            for image in range(batch):
                branches = [signals_of_branches(images[[branch], image], 1)[0] for branch in range(len(images))]
                offset[step, index, image] = max(robust_score(branch) for branch in branches)
        errors.append(error)
        offsets.append(offset)
    return Recorded(errors=np.log(np.concatenate(errors, axis=2)), offsets=np.log(np.concatenate(offsets, axis=2)))


def difficulty(found: Recorded, table: Wide) -> Wide:
    """Return how much larger the error at the last evaluation was than the table's, in the logarithm, (S, ages, B).

    The prediction that was judged there had the same age, as in a run that skips evenly.
    """
    ratios = found.errors - table[:, :, None]
    measured = np.full_like(ratios, np.nan)
    for index, age in enumerate(AGES):
        measured[age:, index] = ratios[:-age, index]
    return measured


def monotone(x: Wide, y: Wide) -> tuple[Wide, Wide]:
    """Return the best rising step curve through points, sorted by x (pool adjacent violators)."""
    order = np.argsort(x)
    blocks: list[list[float]] = []  # mean and count
    for value in y[order]:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, count), (second, more) = blocks[-2:]
            blocks[-2:] = [[(first * count + second * more) / (count + more), count + more]]
    fitted = np.concatenate([np.full(int(count), mean) for mean, count in blocks])
    return x[order], fitted


def curves(fit_x: Wide, fit_y: Wide, x: Wide, *, bins: int) -> Wide:
    """Return the forecasts of monotone curves, one per age and range of steps, (S, ages, B)."""
    forecast = np.full_like(x, np.nan)
    for part, index in itertools.product(np.array_split(np.arange(len(x)), bins), range(len(AGES))):
        known = ~np.isnan(fit_x[part, index] + fit_y[part, index])
        if known.any():
            knots, values = monotone(fit_x[part, index][known], fit_y[part, index][known])
            forecast[part, index] = np.interp(x[part, index], knots, values)
    return forecast


def explained(errors: Wide, forecast: Wide, table: Wide) -> float:
    """Return the share of the variance around the table that a forecast explains; below 0 it is worse than none."""
    known = ~np.isnan(errors + forecast + table[:, :, None])
    left = np.square((errors - forecast)[known]).sum()
    return float(1 - left / np.square((errors - table[:, :, None])[known]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    with Pipeline.open(args.bundle) as pipeline:
        found = recorded(pipeline, args)
    half = args.images // 2
    fit = Recorded(errors=found.errors[..., :half], offsets=found.offsets[..., :half])
    judge = Recorded(errors=found.errors[..., half:], offsets=found.offsets[..., half:])
    table, offset_table = fit.errors.mean(axis=2), fit.offsets.mean(axis=2)
    hard, hard_fit = difficulty(judge, table), difficulty(fit, table)
    moved, moved_fit = judge.offsets - offset_table[:, :, None], fit.offsets - offset_table[:, :, None]
    ratio_fit = fit.errors - table[:, :, None]
    known = ~np.isnan(ratio_fit + hard_fit + moved_fit)
    powers = np.linalg.lstsq(np.column_stack([hard_fit[known], moved_fit[known]]), ratio_fit[known], rcond=None)[0]
    slope = float((hard_fit[known] @ ratio_fit[known]) / (hard_fit[known] @ hard_fit[known]))
    forecasts = {
        "difficulty": table[:, :, None] + slope * hard,
        "curve": curves(fit.offsets, fit.errors, judge.offsets, bins=BINS),
        "curve, step": table[:, :, None] + curves(moved_fit, ratio_fit, moved, bins=BINS),
        "both": table[:, :, None] + powers[0] * hard + powers[1] * moved,
    }
    print(f"power of difficulty {slope:.2f}; of difficulty and √Ŝ together {powers[0]:.2f} and {powers[1]:.2f}")
    for name, forecast in forecasts.items():
        print(
            f"{name:12} explains {100 * explained(judge.errors, forecast, table):6.1f} % of the variance within steps"
        )


if __name__ == "__main__":
    main()
