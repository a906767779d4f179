"""Fréchet distance of a demo bundle's policies to Fashion-MNIST, over many samples; can be interrupted and run again.

    python tools/benchmarks/frechet.py BUNDLE -o build/frechet --policies none,robust@2.2,fewer-steps@2 --samples 5000

Every policy gets the same seeds and labels, so that distances are compared pair by pair: the ratio's interval is far
narrower than those of the distances. Features are the bundled classifier's (no Inception network is at hand here).
Prints one JSON line per policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.quality.classifier import Classifier, load_classifier, load_reference_statistics
from adacorr_deploy.quality.metrics import bootstrap_frechet, bootstrap_frechet_ratio
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy

FIRST_SEED = 1_000_000


def chunk(pipeline: Pipeline, classifier: Classifier, policy: str, index: int, args: argparse.Namespace) -> Path:
    """Sample one batch of a policy and store its features, unless an earlier run did."""
    file: Path = args.output / policy.replace("/", "_") / f"{index:05d}.npz"
    if file.exists():
        return file
    labels = tuple((index * args.batch + image) % 10 for image in range(args.batch))
    request = SampleRequest(labels, steps=args.steps, guidance=args.guidance, seed=FIRST_SEED + index)
    result = sample_with_policy(pipeline, request, policy_named(policy))
    features = classifier.features(result.latents.clip(-1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part.npz")
    np.savez(partial, features=features, labels=labels, rho=result.rho, seconds=result.seconds)
    partial.rename(file)
    return file


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    rho: float
    seconds: float


def sampled(pipeline: Pipeline, classifier: Classifier, policy: str, args: argparse.Namespace) -> Sampled:
    parts = []
    count = -(-args.samples // args.batch)
    for index in range(count):
        parts.append(dict(np.load(chunk(pipeline, classifier, policy, index, args), allow_pickle=False)))
        print(
            f"\r{policy}: {(index + 1) * args.batch} of {count * args.batch} images",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print(file=sys.stderr)
    return Sampled(
        features=np.concatenate([part["features"] for part in parts]).astype(np.float32),
        labels=np.concatenate([part["labels"] for part in parts]).astype(np.int64),
        rho=float(np.mean([part["rho"] for part in parts])),
        seconds=float(np.sum([part["seconds"] for part in parts])),
    )


def check_run(pipeline: Pipeline, args: argparse.Namespace) -> None:
    """Refuse to mix the features of different runs in one folder."""
    names = [name for name in args.policies.split(",") if name.endswith((".json", ".toml"))]
    run = {
        "checkpoint": pipeline.manifest.checkpoint_sha256,
        "batch": args.batch,
        "steps": args.steps,
        "guidance": args.guidance,
        "first_seed": FIRST_SEED,
        "policy_files": {name: Path(name).read_text(encoding="utf-8") for name in names},
    }
    file = args.output / "run.json"
    args.output.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != run:
        raise SystemExit(f"error: {args.output} holds the features of another run ({file}). Choose another folder.")
    file.write_text(json.dumps(run, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the features of finished batches")
    parser.add_argument("--policies", default="none,robust")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=10, help="images per request (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    classifier, reference = load_classifier(), load_reference_statistics()
    with Pipeline.open(args.bundle) as pipeline:
        check_run(pipeline, args)
        baseline = sampled(pipeline, classifier, "none", args)
        for policy in args.policies.split(","):
            mine = baseline if policy == "none" else sampled(pipeline, classifier, policy, args)
            distance = bootstrap_frechet(mine.features, reference, labels=mine.labels)
            row = {
                "policy": policy,
                "samples": len(mine.features),
                "frechet": distance.value,
                "frechet_interval": [distance.low, distance.high],
                "rho": mine.rho,
                "seconds": mine.seconds,
            }
            if policy != "none":
                ratio = bootstrap_frechet_ratio(mine.features, baseline.features, reference, labels=mine.labels)
                row |= {"ratio_to_none": ratio.value, "ratio_interval": [ratio.low, ratio.high]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
