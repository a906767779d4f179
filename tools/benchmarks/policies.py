"""Every policy of the table on one bundle: quality against block launches skipped, and AdaCorrection on its bases.

    adacorr-calibrate demo.bundle --policies teacache,magcache,smoothcache,block-caching,lazydit+adacorrection,…
    python tools/benchmarks/policies.py demo.bundle --images 16 -o build/policies
    python tools/benchmarks/policies.py demo.bundle --families fora --bases fora --on-top paper-lazy -o build/policies
    python tools/benchmarks/policies.py demo.bundle --families '' --bases '' --policies mine.toml -o build/policies

Each policy is turned through its knob. A policy with AdaCorrection on top is compared with its base at equal ρ: the
base's PSNR is interpolated between its own points. So is the paper's weight, which stands on each setting of a base.
The cost axis is the share of block launches skipped, which no other load on the machine touches; times are a matter of
`adacorr-bench`. Finished points are kept in the output folder: an interrupted study goes on, and one of more policies
starts from it. With `--calibrated-guidance G` the calibrations of guidance G are used at `--guidance`, where they don't
hold: no product does so, but it shows what adapting is worth.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.gates.adacorrection import Mode
from adacorr_deploy.caching.policy import ON_TOP, Policy, policy_named
from adacorr_deploy.caching.profile import Profile
from adacorr_deploy.core.bundle import CALIBRATION_DIR, PROFILE_DIR, open_bundle, store_in_bundle
from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.quality.metrics import psnr_per_image
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy
from adacorr_deploy.runtime.measurements import calibrations, profiles

FIRST_SEED: Final = 3_000_000
GRID: Final = {
    "fewer-steps": (1.25, 1.5, 2, 2.5, 3),
    "fora": (2, 3, 4),
    "deepcache": (2, 3, 4),
    "smoothcache": (0.08, 0.12, 0.18, 0.25, 0.35),
    "block-caching": (0.1, 0.15, 0.2, 0.3, 0.4),
    "lazydit": (0.5, 0.75, 0.9, 0.97, 0.99),
    "lazydit-guarded": (0.1, 0.25, 0.5, 0.75),
    "fastcache": (0.003, 0.005, 0.008, 0.012, 0.02),
    "fastcache-guarded": (0.012, 0.02, 0.03, 0.05, 0.1),
    "teacache": (0.02, 0.03, 0.05, 0.07, 0.1),
    "adacache": (0.05, 0.1, 0.15, 0.3, 0.6),
    "fbcache": (0.02, 0.03, 0.05, 0.08, 0.12, 0.18),
    "dbcache": (0.05, 0.1, 0.15, 0.25),
    "dbprune": (0.05, 0.1, 0.15, 0.25),
    "magcache": (0.03, 0.06, 0.12, 0.24),
    "easycache": (0.05, 0.1, 0.2, 0.4),
    "taylorseer": (2, 3, 4),
    "taylorseer-2": (2, 3, 4),
    "scheduled": (1.3, 1.6, 2, 2.5, 3),
    "robust": (1.3, 1.6, 2, 2.5, 3),
    "scheduled-blocks": (1.5, 2, 2.5),
    "robust-blocks": (1.5, 2, 2.5),
}
BASES: Final = ("fastcache", "teacache", "adacache", "lazydit", "fbcache")  # that the paper puts AdaCorrection on
TARGETS: Final = (1.5, 2, 2.5, 3)
_RUN: Final = ("images", "batch", "steps", "guidance", "calibrated_guidance", "seed", "labels")  # of all points


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One policy with one setting."""

    policy: str
    rho: float
    psnr_db: float
    psnr_p10_db: float  # the tenth percentile over images
    images: int

    @property
    def speedup(self) -> float:
        """Of the blocks alone."""
        return 1 / max(1 - self.rho, 1e-6)


class Study:
    """Points of one bundle and one kind of request, each measured once."""

    def __init__(self, pipeline: Pipeline, args: argparse.Namespace) -> None:
        self._pipeline = pipeline
        self._args = args
        self._file: Path = args.output / "points.json"
        self._run = {
            "checkpoint": pipeline.manifest.checkpoint_sha256,
            **{name: getattr(args, name) for name in _RUN},
        }
        self._points = self._stored()
        self._uncached: list[NDArray[np.float32]] = []

    def _stored(self) -> dict[str, Point]:
        if not self._file.exists():
            return {}
        document = json.loads(self._file.read_text(encoding="utf-8"))
        if document["run"] != self._run:
            raise SystemExit(f"error: {self._file} holds another study. Choose another folder.")
        return {name: Point(**point) for name, point in document["points"].items()}

    def point(self, name: str) -> Point | None:
        """Measure a policy, unless an earlier run did; None where it does not run on this bundle."""
        try:
            policy = policy_named(name)
            if Path(name).is_file():  # what it held counts
                name = f"{name}#{hashlib.sha256(policy.model_dump_json().encode()).hexdigest()[:8]}"
            measured = self._points.get(name) or self._measured(name, policy)
        except AdaCorrError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return None
        if name not in self._points:
            self._points[name] = measured
            self._file.parent.mkdir(parents=True, exist_ok=True)
            document = {"run": self._run, "points": {key: asdict(value) for key, value in self._points.items()}}
            self._file.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return measured

    def _measured(self, name: str, policy: Policy) -> Point:
        psnr, rho = [], []
        for index, request in enumerate(self._requests()):
            result = sample_with_policy(self._pipeline, request, policy)
            psnr.append(psnr_per_image(result.latents, self._uncached_latents(index, request)))
            rho.append(result.rho)
        values = np.minimum(np.concatenate(psnr), 99.0)  # where nothing was reused
        return Point(
            policy=name,
            rho=float(np.mean(rho)),
            psnr_db=float(values.mean()),
            psnr_p10_db=float(np.quantile(values, 0.1)),
            images=len(values),
        )

    def _uncached_latents(self, index: int, request: SampleRequest) -> NDArray[np.float32]:
        if index == len(self._uncached):
            self._uncached.append(sample_with_policy(self._pipeline, request, policy_named("none")).latents)
        return self._uncached[index]

    def _requests(self) -> Iterator[SampleRequest]:
        classes = [int(label) for label in self._args.labels.split(",")] if self._args.labels else None
        count = self._pipeline.manifest.model.num_classes
        for first in range(0, self._args.images, self._args.batch):
            images = range(first, min(first + self._args.batch, self._args.images))
            yield SampleRequest(
                tuple(classes[image % len(classes)] if classes else image % count for image in images),
                steps=self._args.steps,
                guidance=self._args.guidance,
                seed=self._args.seed + first,
            )


def interpolated(points: Sequence[Point], rho: float) -> float | None:
    """Return the PSNR that a policy's own points have at ρ, by interpolation; None outside them."""
    ordered = sorted(points, key=lambda point: point.rho)
    if len(ordered) < 2 or not ordered[0].rho <= rho <= ordered[-1].rho:
        return None
    return float(np.interp(rho, [point.rho for point in ordered], [point.psnr_db for point in ordered]))


def measured_families(study: Study, families: Sequence[str]) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for family in families:
        found = [study.point(f"{family}@{value:g}") for value in GRID[family]]
        points[family] = [point for point in found if point is not None]
        for point in points[family]:
            show(point)
    return points


def on_top(study: Study, word: str, base_points: Sequence[Point]) -> Iterator[tuple[Point, float | None]]:
    """Yield a base with a correction on top, each with the base's own PSNR at equal ρ.

    AdaCorrection is aimed at each target, on the base set to skip about as much; the paper's weight, which has no
    target, stands on every setting of the base.
    """
    for name in corrected_names(word, base_points):
        point = study.point(name)
        if point is not None:
            yield point, interpolated(base_points, point.rho)


def corrected_names(word: str, base_points: Sequence[Point]) -> Iterator[str]:
    if ON_TOP[word] is not Mode.ROBUST:
        yield from (f"{point.policy}+{word}" for point in base_points)
    elif base_points:
        for target in TARGETS:
            nearest = min(base_points, key=lambda point: abs(np.log(point.speedup / target)))
            yield f"{nearest.policy}+{word}@{target:g}"


def misled_bundle(source: Path, target: Path, calibrated: float, used: float) -> Path:
    """Copy a bundle in which what was calibrated for one guidance says that it was for another."""
    if not target.exists():
        shutil.copytree(source, target)
        bundle = open_bundle(target)
        held: list[tuple[str, Calibration | Profile]] = [
            *((CALIBRATION_DIR, each) for each in calibrations(bundle).values()),
            *((PROFILE_DIR, each) for each in profiles(bundle).values()),
        ]
        for folder, each in held:
            if each.key.guidance == calibrated:
                key = each.key.model_copy(update={"guidance": used})
                forged = each.model_copy(update={"key": key})
                store_in_bundle(bundle, f"{folder}/{forged.file_name}", forged.model_dump_json().encode())
    return target


def show(point: Point, base_psnr_db: float | None = None) -> None:
    compared = (
        "" if base_psnr_db is None else f"   base at equal ρ {base_psnr_db:5.1f} ({point.psnr_db - base_psnr_db:+.1f})"
    )
    print(
        f"{point.policy:44} ρ {point.rho:.3f}  {point.speedup:4.2f}x  {point.psnr_db:5.1f} dB  "
        f"p10 {point.psnr_p10_db:5.1f}{compared}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for finished points")
    parser.add_argument("--families", default=",".join(GRID), help="presets, with commas between them")
    parser.add_argument("--bases", default=",".join(BASES), help="presets that AdaCorrection is put on")
    parser.add_argument("--on-top", choices=list(ON_TOP), default="adacorrection", help="what is put on the bases")
    parser.add_argument("--policies", default="", help="further policies, names or files, with commas between them")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="images that decide together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--calibrated-guidance", type=float, help="use the calibrations of this guidance instead")
    parser.add_argument("--labels", default="", help="classes, in place of all in turn")
    args = parser.parse_args()
    families = [name for name in args.families.split(",") if name]
    bases = [name for name in args.bases.split(",") if name]
    if unknown := [name for name in (*families, *bases) if name not in GRID]:
        raise SystemExit(f"error: {unknown[0]} is none of {', '.join(GRID)}.")
    bundle = args.bundle
    if args.calibrated_guidance is not None:
        bundle = misled_bundle(args.bundle, args.output / "misled.bundle", args.calibrated_guidance, args.guidance)
    with Pipeline.open(bundle) as pipeline:
        study = Study(pipeline, args)
        points = measured_families(study, families)
        for base in bases:
            base_points = points.get(base) or measured_families(study, [base])[base]
            for point, base_psnr_db in on_top(study, args.on_top, base_points):
                show(point, base_psnr_db)
        for name in args.policies.split(",") if args.policies else ():
            measured = study.point(name)
            if measured is not None:
                show(measured)


if __name__ == "__main__":
    main()
