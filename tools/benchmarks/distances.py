"""Sets of images: Fréchet distances of policies and samplers over many samples, and of pairs of them.

    python tools/benchmarks/distances.py demo.bundle --samples 2000 -o build/distances --pairs robust@2=dpmpp-2m/22,…

A run is a policy (with the bundle's own sampler and `--steps`) or SAMPLER/STEPS, uncached. Of each run and of the
uncached one it prints the distance to real images and to the uncached samples; of each pair A=B, A's distance ÷ B's,
below 1 where A is nearer. All runs have the same seeds, and a pair is resampled image by image, so what both have in
common cancels.

`adacorr-bench --samples` says more of each policy, and samples the fewer-steps row of each too, which here would take
most of the time. All runs advance together, `--advance` images at a time, and what is finished is kept: an interrupted
study goes on, and one of more samples, runs or pairs starts from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from adacorr_deploy.caching.policy import Policy, policy_named
from adacorr_deploy.core.errors import AdaCorrError, RequestError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.quality.bench_options import MAX_IMAGES, BenchOptions
from adacorr_deploy.quality.bench_sampling import Sampler as BenchSampler
from adacorr_deploy.quality.bench_store import ResultStore, RunKey
from adacorr_deploy.quality.features import FeatureSource, feature_source
from adacorr_deploy.quality.metrics import (
    BootstrapInterval,
    FeatureStatistics,
    bootstrap_frechet,
    bootstrap_frechet_ratio,
    feature_statistics,
)
from adacorr_deploy.runtime import Pipeline
from adacorr_deploy.runtime.request import check_integer

UNCACHED = "none"

Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A policy, and what it samples."""

    name: str
    policy: Policy
    options: BenchOptions

    @classmethod
    def named(cls, name: str, options: BenchOptions) -> Run:
        """Return the run that a name stands for.

        Raises:
            AdaCorrError: If it is neither a policy nor a sampler with its steps.
        """
        sampler, slash, steps = name.partition("/")
        if sampler not in set(Sampler) or not slash:
            return cls(name=name, policy=policy_named(name), options=options)
        if not steps.isdecimal():
            raise RequestError(f"{name}: {steps!r} is no number of steps. Write for example {sampler}/20.")
        options = replace(options, sampler=Sampler(sampler), steps=int(steps))
        return cls(name=name, policy=policy_named(UNCACHED), options=options)


class Study:
    """The features of all runs, of as many samples as there are so far."""

    def __init__(self, pipeline: Pipeline, source: FeatureSource, folder: Path) -> None:
        self._pipeline = pipeline
        self._source = source
        self._folder = folder
        self._features: dict[str, Features] = {}

    def advance(self, runs: Sequence[Run], samples: int, progress: Progress) -> None:
        """Bring every run to so many samples."""
        task = progress.add_task(f"{samples} samples", total=len(runs))
        for run in runs:
            options = replace(run.options, samples=samples)
            sampled_with = f"{options.sampler.value if options.sampler else 'own'}-{options.steps}"
            store = ResultStore.open(
                self._folder / sampled_with, RunKey.of(self._pipeline, options, self._source.identity)
            )
            sampler = BenchSampler(self._pipeline, options, store, lambda _text: None)
            self._features[run.name] = sampler.features(run.policy, self._source.network)
            progress.advance(task)

    def distances(self, name: str, real: FeatureStatistics) -> dict[str, BootstrapInterval]:
        features, uncached = self._features[name], self._features[UNCACHED]
        labels = self._labels(len(features))
        found = {"frechet": bootstrap_frechet(features, real, labels=labels)}
        if name != UNCACHED:
            found["frechet_ratio"] = bootstrap_frechet_ratio(features, uncached, real, labels=labels)
            found["frechet_uncached"] = bootstrap_frechet(features, feature_statistics(uncached), labels=labels)
        return found

    def ratios(self, first: str, second: str, real: FeatureStatistics) -> dict[str, BootstrapInterval]:
        one, other = self._features[first], self._features[second]
        labels, uncached = self._labels(len(one)), feature_statistics(self._features[UNCACHED])
        return {
            "frechet": bootstrap_frechet_ratio(one, other, real, labels=labels),
            "frechet_uncached": bootstrap_frechet_ratio(one, other, uncached, labels=labels),
        }

    def _labels(self, count: int) -> NDArray[np.int64]:
        return np.arange(count, dtype=np.int64) % max(self._pipeline.manifest.model.num_classes, 1)


def stages(samples: int, advance: int) -> Iterator[int]:
    """Yield the numbers of samples at which all runs stand level, the last of them `samples`."""
    yield from range(advance, samples, advance)
    yield samples


def shown(intervals: dict[str, BootstrapInterval]) -> str:
    return "   ".join(f"{name} {each.value:.3f} ({each.low:.3f}–{each.high:.3f})" for name, each in intervals.items())


def cells(intervals: dict[str, BootstrapInterval]) -> dict[str, list[float]]:
    return {name: [each.value, each.low, each.high] for name, each in intervals.items()}


def study(args: argparse.Namespace) -> dict[str, object]:
    """Sample, print, and return everything as one document."""
    check_integer("--advance", args.advance, 1, MAX_IMAGES)
    pairs = [tuple(pair.split("=")) for pair in args.pairs.split(",") if pair]
    if wrong := next(("=".join(pair) for pair in pairs if len(pair) != 2), None):
        raise RequestError(f"--pairs: {wrong!r} is no pair. Write A=B, with commas between the pairs.")
    wanted = [UNCACHED, *(name for name in args.runs.split(",") if name), *(name for pair in pairs for name in pair)]
    options = BenchOptions(batch=args.batch, steps=args.steps, guidance=args.guidance, seed=args.seed)
    runs = [Run.named(name, options) for name in dict.fromkeys(wanted)]
    with Pipeline.open(args.bundle) as pipeline, Progress() as progress:
        source = feature_source(pipeline.manifest, args.features, args.reference_features)
        if source is None or source.real is None:
            raise RequestError("This bundle has no features of real images. Give --features and --reference-features.")
        work, real = Study(pipeline, source, args.output), source.real.statistics
        for samples in stages(args.samples, args.advance):
            work.advance(runs, samples, progress)
        distances = {run.name: work.distances(run.name, real) for run in runs}
        ratios = {f"{one} ÷ {other}": work.ratios(one, other, real) for one, other in pairs}
    for name, intervals in (distances | ratios).items():
        print(f"{name:64} {shown(intervals)}")
    return {
        "samples": args.samples,
        "distances": {name: cells(intervals) for name, intervals in distances.items()},
        "ratios": {name: cells(intervals) for name, intervals in ratios.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for what is finished")
    parser.add_argument("--samples", type=int, default=2000, help="images of each run (default: %(default)s)")
    parser.add_argument("--advance", type=int, default=200, help="images that all runs take in turn")
    parser.add_argument("--runs", default="", help="policies, or SAMPLER/STEPS, with commas between them")
    parser.add_argument("--pairs", default="", help="A=B of such runs, with commas between the pairs")
    parser.add_argument("--batch", type=int, default=8, help="images that decide together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--features", type=Path, help="as adacorr-bench")
    parser.add_argument("--reference-features", type=Path, help="as adacorr-bench")
    args = parser.parse_args()
    try:
        document = study(args)
    except AdaCorrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "distances.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
