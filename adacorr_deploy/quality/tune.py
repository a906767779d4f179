"""Tuning: the policy and the setting that serve a target best on a bundle's own images.

Every family of policies (a preset and its knob) is searched for the knob that meets the target, on few images; half of
the families go on to twice as many images, and so on (successive halving). Points are compared by what is the same
whenever it is measured: the share of block launches skipped, and PSNR against the uncached images. In the end the front
is timed, in turns with the uncached run, since that is what a user waits for. What reusing costs makes a policy slower
than its share of skipped launches says, so a target speed is then aimed at once more, by that much higher.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.core.bundle import CALIBRATION_DIR
from adacorr_deploy.core.errors import PolicyError, RequestError
from adacorr_deploy.core.manifest import MANIFEST_NAME, file_record
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.quality.metrics import psnr_per_image
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.tune_search import Knob, Target, pareto_front, search, survivors
from adacorr_deploy.runtime import Pipeline, SampleRequest, check_request, controller_for_request, sample_with_policy
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.request import check_integer
from adacorr_deploy.runtime.sampling import run_of_request

TUNING_SEED: Final = 20_270_101  # apart from calibration's images, which the calibrated policies know
IMAGES_AT_ONCE: Final = 4
MAX_IMAGES: Final = 1024
TIMED_ROUNDS: Final = 3
ON_TOP: Final = "+adacorrection"
_UNCACHED: Final = PRESETS["none"]
_FEWEST: Final = 3  # families that go on in any case
_AIMS: Final = 2  # times that a target speed is aimed at anew, by what the clock showed
_NEAR: Final = 0.03  # relative distance of the chosen point's speed-up from the target at which aiming ends
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """For which runs to tune, and for what.

    Attributes:
        families: Presets with a knob; `NAME+adacorrection` puts AdaCorrection on top of NAME, tuned first.
        images: Of the last round.

    Raises:
        RequestError: If there are no images, no families, or the target is out of range.
    """

    target: Target
    families: tuple[str, ...]
    sampler: Sampler = Sampler.DDIM
    steps: int = 50
    guidance: float = 4.0
    images: int = 16

    def __post_init__(self) -> None:
        check_integer("images", self.images, 1, MAX_IMAGES)
        if not self.families:
            raise RequestError("there is no policy to tune. Name at least one that has a knob.")
        for name, value, low, high in (
            ("target speed-up", self.target.speedup, 1.0, 20.0),
            ("target PSNR", self.target.psnr_db, 1.0, 120.0),
        ):
            if value is not None and not low < value <= high:
                raise RequestError(f"{name} is {value:g}, allowed is more than {low:g} and at most {high:g}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPoint:
    """One policy, measured.

    Attributes:
        images: That it was measured on.
        rho: Share of block launches skipped.
        speedup: 1 ÷ (1 − ρ): of the blocks' time, the same on every machine.
        psnr_db: Mean over the images that differ from the uncached ones; infinite if none does.
        psnr_worst_db: The lowest of them.
        measured_speedup: Uncached time ÷ time, median of rounds in turns; None where it was not timed.
    """

    policy: Policy
    images: int
    rho: float
    speedup: float
    psnr_db: float
    psnr_worst_db: float
    measured_speedup: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What a search found.

    Attributes:
        chosen: The point that serves the target best.
        front: The Pareto front of the last round's points and of those aimed by the clock, slowest first, timed.
        points: All points of the last round.
    """

    chosen: TunedPoint
    meets_target: bool
    front: tuple[TunedPoint, ...]
    points: tuple[TunedPoint, ...]

    @property
    def table(self) -> tuple[TunedPoint, ...]:
        """The points, and those of the front that were aimed at by the clock alone."""
        policies = {point.policy for point in self.points}
        return (*self.points, *(point for point in self.front if point.policy not in policies))


def families_that_fit(pipeline: Pipeline, request: SampleRequest) -> tuple[str, ...]:
    """Return the presets that have a knob and whose spans the bundle has, whether it is calibrated for them or not."""
    return tuple(name for name, policy in PRESETS.items() if policy.gate.knob and _fits(pipeline, request, policy))


def _fits(pipeline: Pipeline, request: SampleRequest, policy: Policy) -> bool:
    try:
        policy.spans_of(run_of_request(pipeline.bundle, request, policy))
    except PolicyError:
        return False
    return True


def tune(pipeline: Pipeline, options: TuneOptions, progress: Progress | None = None) -> Tuned:
    """Search the families for the target. The last round's points are deterministic; what the clock decides is not.

    What an interrupted search has measured on this bundle is taken up, also for another target.

    Raises:
        CalibrationError: If a policy looks up what the bundle does not hold.
        PolicyError: If a family has no knob, or does not fit the bundle.
        RequestError: If an option is out of range.
        EngineError: If an engine fails.
        BundleError: If the bundle can't be written.
    """
    requests = list(_requests(pipeline, options))
    for request in requests:
        check_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    for family in options.families:
        policy = policy_named(family)
        _knob_value(policy)
        controller_for_request(pipeline, requests[0], policy)
    meter = Meter(pipeline, requests, _partials(pipeline, options))
    searcher = _Searcher(meter, options, progress or (lambda phase, done, total: None))
    points = searcher.last_round()
    timed = meter.timed(pareto_front(points))
    for _ in range(_AIMS):
        aim = _aim_by_clock(timed, options.target)
        if aim is None:
            break
        front = pareto_front([*timed, *searcher.aimed(aim)])
        known = {point.policy: point for point in timed}
        fresh = {point.policy: point for point in meter.timed([one for one in front if one.policy not in known])}
        timed = [(known | fresh)[point.policy] for point in front]
    chosen = _chosen(timed, options.target)
    meter.discard()
    return Tuned(chosen=chosen, meets_target=_meets(chosen, options.target), front=tuple(timed), points=tuple(points))


def _requests(pipeline: Pipeline, options: TuneOptions) -> Iterator[SampleRequest]:
    model = pipeline.manifest.model
    for first in range(0, options.images, IMAGES_AT_ONCE):
        images = range(first, min(first + IMAGES_AT_ONCE, options.images))
        request = SampleRequest(
            labels=tuple(image % max(model.num_classes, 1) for image in images),
            steps=options.steps,
            guidance=options.guidance,
            seed=TUNING_SEED + first,
            sampler=options.sampler,
        )
        yield example_request(model, request, images, pipeline.example_prompts)


def _partials(pipeline: Pipeline, options: TuneOptions) -> Partials:
    bundle = pipeline.bundle.path
    identity = {
        "measurement": _VERSION,
        "manifest": file_record(bundle / MANIFEST_NAME).sha256,  # calibrations and profiles are listed in it
        "backend": pipeline.backend.name,
        "run": [options.sampler.value, options.steps, options.guidance],
        "prompts": pipeline.example_prompts_sha256,
    }
    return Partials(bundle / CALIBRATION_DIR / ".unfinished-tuning", identity)


class Meter:
    """Samples policies on the first so many requests, each of them once."""

    def __init__(self, pipeline: Pipeline, requests: Sequence[SampleRequest], partials: Partials) -> None:
        self._pipeline = pipeline
        self._requests = requests
        self._partials = partials
        self._uncached: dict[int, NDArray[np.float32]] = {}

    @property
    def requests(self) -> int:
        return len(self._requests)

    def point(self, policy: Policy, requests: int) -> TunedPoint:
        """Measure a policy on the first requests."""
        found = [self._measured(policy, index) for index in range(requests)]
        psnr = np.concatenate([each["psnr"] for each in found])
        differing = psnr[np.isfinite(psnr)]
        images = np.array([len(each["psnr"]) for each in found])
        rho = float(np.average([float(each["rho"]) for each in found], weights=images))
        return TunedPoint(
            policy=policy,
            images=int(images.sum()),
            rho=rho,
            speedup=1 / max(1 - rho, 1e-6),
            psnr_db=float(differing.mean()) if differing.size else math.inf,
            psnr_worst_db=float(psnr.min()),
        )

    def _measured(self, policy: Policy, index: int) -> dict[str, NDArray[np.generic]]:
        request = self._requests[index]
        settings = policy.model_copy(update={"name": "any"}).model_dump_json()
        name = f"{hashlib.sha256(settings.encode()).hexdigest()[:32]}-{request.batch}-{index}"
        like = {"psnr": np.zeros(request.batch), "rho": np.zeros(())}
        stored = self._partials.load(name, like)
        if stored is not None and 0 <= float(stored["rho"]) <= 1 and not np.isnan(stored["psnr"]).any():
            return stored
        result = sample_with_policy(self._pipeline, request, policy)
        psnr = psnr_per_image(result.latents, self._uncached_latents(index))
        measured: dict[str, NDArray[np.generic]] = {"psnr": np.asarray(psnr, np.float64), "rho": np.asarray(result.rho)}
        self._partials.store(name, measured)
        return measured

    def _uncached_latents(self, index: int) -> NDArray[np.float32]:
        if index not in self._uncached:
            self._uncached[index] = sample_with_policy(self._pipeline, self._requests[index], _UNCACHED).latents
        return self._uncached[index]

    def timed(self, points: Sequence[TunedPoint]) -> list[TunedPoint]:
        """Time points on the first request, each beside an uncached run of its own: what else runs touches both."""
        speedups: dict[str, list[float]] = {point.policy.name: [] for point in points}
        for round_index in range(TIMED_ROUNDS + 1):
            for point in points:
                uncached, own = (
                    sample_with_policy(self._pipeline, self._requests[0], policy).seconds
                    for policy in (_UNCACHED, point.policy)
                )
                if round_index:  # the first round allocates and binds
                    speedups[point.policy.name].append(uncached / own)
        return [replace(point, measured_speedup=statistics.median(speedups[point.policy.name])) for point in points]

    def discard(self) -> None:
        """Forget what was measured: the search is complete."""
        self._partials.discard()


class _Searcher:
    """Successive halving over families."""

    def __init__(self, meter: Meter, options: TuneOptions, progress: Progress) -> None:
        self._meter = meter
        self._options = options
        self._progress = progress
        self._target = options.target
        self._knobs: dict[str, float] = {}  # the best value of each family so far
        self._last: Sequence[str] = ()  # families of the last round

    def last_round(self) -> list[TunedPoint]:
        """Return the points of the families that came to the last round."""
        families, requests = list(self._options.families), 1
        while True:
            points = self._round(families, requests)
            if requests == self._meter.requests:
                self._last = families
                return [point for family in families for point in points[family]]
            best = [
                (family, found)
                for family in families
                if (found := self._options.target.best(points[family])) is not None
            ]
            families = survivors(best, self._options.target, max(_FEWEST, math.ceil(len(families) / 2)))
            requests = min(2 * requests, self._meter.requests)

    def aimed(self, target: Target) -> list[TunedPoint]:
        """Search the families of the last round for another target, and return its points."""
        self._target = target
        points = self._round(self._last, self._meter.requests)
        return [point for family in self._last for point in points[family]]

    def _round(self, families: Sequence[str], requests: int) -> dict[str, list[TunedPoint]]:
        points: dict[str, list[TunedPoint]] = {}
        # A base's own knob is tuned before AdaCorrection is put on top of it.
        ordered = sorted(families, key=lambda family: family.endswith(ON_TOP))
        images = min(requests * IMAGES_AT_ONCE, self._options.images)
        for index, family in enumerate(ordered):
            self._progress(f"{family}, {images} images", index, len(ordered))
            points[family] = self._searched(family, requests)
        self._progress(f"{images} images", len(ordered), len(ordered))
        return points

    def _searched(self, family: str, requests: int) -> list[TunedPoint]:
        preset = policy_named(family)
        start = self._start(family, preset)
        whole = not family.endswith(ON_TOP) and isinstance(_knob_value(preset), int)

        def measure(value: float) -> TunedPoint | None:
            try:
                policy = policy_named(self._named(family, value))
            except PolicyError:  # beyond what the knob allows
                return None
            return self._meter.point(policy, requests)

        found = search(Knob(start=start, whole=whole), measure, self._target)
        best = self._target.best(found)
        if best is not None:
            self._knobs[family] = float(best.policy.name.rpartition("@")[2].partition("+")[0])
        return found

    def _start(self, family: str, preset: Policy) -> float:
        if family in self._knobs:
            return self._knobs[family]
        aims = family.endswith(ON_TOP) or preset.gate.knob == "speedup"
        if aims and self._options.target.speedup is not None:
            return self._options.target.speedup
        return 2.0 if aims else float(_knob_value(preset))

    def _named(self, family: str, value: float) -> str:
        if not family.endswith(ON_TOP):  # the paper's modes have no knob of their own: it is the base's that turns
            base, plus, mode = family.partition("+")
            return f"{base}@{value:.4g}{plus}{mode}"
        base = family.removesuffix(ON_TOP)
        knob = f"@{self._knobs[base]:.4g}" if base in self._knobs else ""
        return f"{base}{knob}{ON_TOP}@{value:.4g}"


def _knob_value(policy: Policy) -> float | int:
    """Return what a preset's knob is set to.

    Raises:
        PolicyError: If it has none.
    """
    value = policy.gate.model_dump().get(policy.gate.knob)
    if not isinstance(value, int | float):
        raise PolicyError(f"policy {policy.name} has no knob to tune. Choose others.")
    return value


def _aim_by_clock(front: Sequence[TunedPoint], target: Target) -> Target | None:
    """Return the speed-up of the blocks that takes the clock to the target; None if it is there, or none was asked."""
    if target.speedup is None:
        return None
    wanted = target.speedup
    chosen = _chosen(front, target)
    if 0 <= _clocked(chosen) / wanted - 1 <= _NEAR:
        return None
    nearest = min(front, key=lambda point: abs(math.log(_clocked(point) / wanted)))
    return Target(speedup=max(wanted * nearest.speedup / _clocked(nearest), 1.01))


def _clocked(point: TunedPoint) -> float:
    return point.measured_speedup or point.speedup


def _chosen(front: Sequence[TunedPoint], target: Target) -> TunedPoint:
    """Return the point that serves the target best by what was timed."""
    by_clock = [replace(point, speedup=_clocked(point)) for point in front]
    best = target.best(by_clock)
    if best is None:
        raise AssertionError("a search without points")
    return next(point for point in front if point.policy == best.policy)


def _meets(point: TunedPoint, target: Target) -> bool:
    return target.is_met(replace(point, speedup=_clocked(point)))
