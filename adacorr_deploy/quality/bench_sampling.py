"""What each policy makes of the same requests: images, decisions, how its error grows, features for sets of images."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.plugins.service_parts import has_frames
from adacorr_deploy.quality.bench_options import BenchOptions, requests
from adacorr_deploy.quality.bench_store import Arrays, ArraySpec, ResultStore
from adacorr_deploy.quality.features import FeatureNetwork, image_shape
from adacorr_deploy.quality.flops import FlopCounter
from adacorr_deploy.runtime import Pipeline, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.runtime.trace import Trace

TRAJECTORY_BYTES: Final = 64 << 20  # of the latents of every step that are kept: of as many images as fit

SHOWN_IMAGES: Final = 16
SHOWN_SIDE: Final = 128  # pixels

Floats32 = NDArray[np.float32]
Advance = Callable[[str], None]  # told after each request


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What each block did at each step of the first request: for S steps and L block parts.

    Guidance branches decide together, so there is one decision for all of them.
    """

    actions: NDArray[np.str_]  # (S, L): values of `caching.decisions.Action`
    reasons: NDArray[np.str_]  # (S, L)
    scores: NDArray[np.float64]  # (S, L); NaN where the policy computes none


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The first request, step by step.

    Attributes:
        latents: Of its first images after every step, (S, b, C, H, W).
        seconds: Each step's own time, (S,); on a GPU, which works while the host goes on, that of the read-back too.
    """

    decisions: Decisions
    latents: Floats32
    seconds: NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class Sampled:
    """One policy's images, and what making them took.

    Attributes:
        latents: (N, C, H, W).
        rho: Mean over the requests of the share of block launches skipped.
        pictures: The first images as a page shows them, at most `SHOWN_IMAGES` of at most `SHOWN_SIDE` pixels.
        flops: Operations per image (`quality.flops`); None if they can't be told.
        growth: Relative L2 error of the latents after each step against the uncached run's, RMS over images, (S,); None
            for a run of other steps, whose latents stand at other noise levels.
        features: Of all images, (N, F); None without a network.
    """

    policy: Policy
    latents: Floats32
    rho: float
    flops: float | None
    trajectory: Trajectory
    growth: NDArray[np.float64] | None = None
    features: Floats32 | None = None
    pictures: Floats32 | None = None


class Sampler:
    """Samples the bench's requests with any policy, and keeps what is finished."""

    def __init__(self, pipeline: Pipeline, options: BenchOptions, store: ResultStore, advance: Advance) -> None:
        self._pipeline = pipeline
        self._options = options
        self._store = store
        self._advance = advance
        self._counter = FlopCounter(pipeline)

    def sampled(
        self, policy: Policy, uncached: Sampled | None, *, network: FeatureNetwork | None = None, shown: bool = False
    ) -> Sampled:
        """Return a policy's images, compared step by step with the uncached ones.

        Args:
            policy: Whose images.
            uncached: What `none` made; None for itself.
            network: Whose features of the images are wanted.
            shown: Whether the first images are wanted as pictures.

        Raises:
            EngineError: If an engine fails, or the latents become NaN.
            PolicyError: If the controller asks for what its slot can't give.
        """
        asked = requests(self._pipeline, self._options)
        trajectory, batches = self._first(policy, next(asked))
        for index, request in enumerate(asked, start=1):
            batches.append(self._batch(policy, request, index))
        flops = sum(float(batch["flops"]) for batch in batches)
        made = Sampled(
            policy=policy,
            latents=np.concatenate([np.asarray(batch["latents"], np.float32) for batch in batches]),
            rho=statistics.fmean(float(batch["rho"]) for batch in batches),
            flops=None if math.isnan(flops) else flops / self._options.images,
            trajectory=trajectory,
        )
        if network is not None:
            made.features = self._features_of(made.latents, network)
        if shown:
            made.pictures = self._shown(made.latents)
        base = trajectory if uncached is None else uncached.trajectory
        if base.latents.shape == trajectory.latents.shape:
            made.growth = relative_errors(trajectory.latents, base.latents)
        return made

    def features(self, policy: Policy, network: FeatureNetwork) -> Floats32:
        """Return the features of `options.samples` images, (N, F); errors as `sampled`."""
        made = []
        width = network.features(np.zeros((1, *image_shape(self._pipeline.manifest)), np.float32)).shape[1]
        for index, request in enumerate(requests(self._pipeline, self._options, self._options.samples)):
            name, spec = f"samples-{index:05d}", {"features": ArraySpec(dtype="f4", shape=(request.batch, width))}
            arrays = self._store.load(policy, name, spec)
            if arrays is None:
                latents = sample_with_policy(self._pipeline, request, policy).latents
                arrays = {"features": network.features(self._pictures(latents))}
                self._store.save(policy, name, arrays)
            made.append(np.asarray(arrays["features"], np.float32))
            self._advance(f"{policy.name}, {self._options.samples} samples")
        return np.concatenate(made)

    def _features_of(self, latents: Floats32, network: FeatureNetwork) -> Floats32:
        """Return features batch by batch, so that decoded images never stand in memory all at once."""
        size = self._options.batch
        parts = [latents[first : first + size] for first in range(0, len(latents), size)]
        return np.concatenate([network.features(self._pictures(part)) for part in parts])

    def _pictures(self, latents: Floats32) -> Floats32:
        """Return the images that latents stand for: decoded where the bundle has a decoder, else as they are."""
        if self._pipeline.manifest.decoder is None:
            return latents
        return self._pipeline.decode(latents)

    def _shown(self, latents: Floats32) -> Floats32:
        """Return the first pictures, (N, C, H, W): of a clip, its first frame."""
        pictures = self._pictures(latents[:SHOWN_IMAGES])
        if has_frames(self._pipeline.manifest.model):
            pictures = pictures[:, 0] if self._pipeline.manifest.decoder is not None else pictures[:, :, 0]
        step = -(-max(pictures.shape[2:]) // SHOWN_SIDE)
        return np.ascontiguousarray(pictures[:, :, ::step, ::step])

    def _first(self, policy: Policy, request: SampleRequest) -> tuple[Trajectory, list[Arrays]]:
        """Return the first request's trajectory and images."""
        steps = policy.sampled_steps(request.steps)
        kept = self._kept_images(request, steps)
        specs = _trajectory_specs(steps, (kept, *request_shape(self._pipeline, request)[1:]), self._pipeline)
        images = self._store.load(policy, "images-00000", self._image_specs(request))
        stored = self._store.load(policy, "trajectory", specs)
        if images is None or stored is None:
            seen: list[Floats32] = []
            times = [time.perf_counter()]

            def observe(step: int, latents: Floats32) -> None:
                seen.append(latents[:kept])
                times.append(time.perf_counter())

            before = self._counter.launches()
            result = sample_with_policy(self._pipeline, request, policy, on_latents=observe)
            images = self._images(result, self._counter.since(before, request, steps=steps))
            seconds = np.array([later - earlier for earlier, later in itertools.pairwise(times)])
            stored = {**_arrays_of_trace(result.trace), "latents": np.stack(seen), "seconds": seconds}
            self._store.save(policy, "trajectory", stored)
            self._store.save(policy, "images-00000", images)
        self._advance(f"{policy.name}, {self._options.images} images")
        return _trajectory(stored), [images]

    def _batch(self, policy: Policy, request: SampleRequest, index: int) -> Arrays:
        name = f"images-{index:05d}"
        arrays = self._store.load(policy, name, self._image_specs(request))
        if arrays is None:
            before = self._counter.launches()
            result = sample_with_policy(self._pipeline, request, policy)
            steps = policy.sampled_steps(request.steps)
            arrays = self._images(result, self._counter.since(before, request, steps=steps))
            self._store.save(policy, name, arrays)
        self._advance(f"{policy.name}, {self._options.images} images")
        return arrays

    def _kept_images(self, request: SampleRequest, steps: int) -> int:
        one = 4 * steps * math.prod(request.latent_shape(self._pipeline.manifest.model))
        return max(1, min(request.batch, TRAJECTORY_BYTES // one))

    def _image_specs(self, request: SampleRequest) -> dict[str, ArraySpec]:
        return {
            "latents": ArraySpec(dtype="f4", shape=request_shape(self._pipeline, request)),
            "rho": ArraySpec(dtype="f8", shape=()),
            "flops": ArraySpec(dtype="f8", shape=(), finite=False),
        }

    @staticmethod
    def _images(result: SampleResult, flops: int | None) -> Arrays:
        return {
            "latents": result.latents.astype(np.float32),
            "rho": np.array(result.rho, np.float64),
            "flops": np.array(math.nan if flops is None else flops, np.float64),
        }


def request_shape(pipeline: Pipeline, request: SampleRequest) -> tuple[int, ...]:
    """Return the shape of a request's latents, (B, C, H, W)."""
    return (request.batch, *request.latent_shape(pipeline.manifest.model))


def relative_errors(latents: Floats32, expected: Floats32) -> NDArray[np.float64]:
    """Return ‖x − x̄‖ / ‖x̄‖ of every step, RMS over images: (S, b, …) → (S,)."""
    steps, images = latents.shape[:2]
    wide = np.asarray(expected, np.float64).reshape(steps, images, -1)
    apart = np.asarray(latents, np.float64).reshape(steps, images, -1) - wide
    squares = np.square(apart).sum(axis=2) / np.maximum(np.square(wide).sum(axis=2), 1e-30)
    errors: NDArray[np.float64] = np.sqrt(squares.mean(axis=1))
    return errors


def _arrays_of_trace(trace: Trace) -> dict[str, NDArray[np.generic]]:
    """Return a trace as tables of steps × block parts."""
    shape = (trace.steps, len(trace.blocks))
    places = {name: index for index, name in enumerate(trace.blocks)}
    actions, reasons = np.empty(shape, dtype=object), np.empty(shape, dtype=object)
    scores = np.full(shape, math.nan)
    for record in trace.records:
        if record.branch is not trace.branches[0]:
            continue
        place = record.step, places[record.block]
        actions[place], reasons[place] = record.action.value, record.reason
        if record.score is not None:
            scores[place] = record.score
    return {"actions": actions.astype(np.str_), "reasons": reasons.astype(np.str_), "scores": scores}


def _trajectory_specs(steps: int, images: tuple[int, ...], pipeline: Pipeline) -> dict[str, ArraySpec]:
    table = (steps, len(pipeline.manifest.model.units))
    return {
        "actions": ArraySpec(dtype="U", shape=table),
        "reasons": ArraySpec(dtype="U", shape=table),
        "scores": ArraySpec(dtype="f8", shape=table, finite=False),
        "latents": ArraySpec(dtype="f4", shape=(steps, *images)),
        "seconds": ArraySpec(dtype="f8", shape=(steps,)),
    }


def _trajectory(arrays: Arrays) -> Trajectory:
    return Trajectory(
        decisions=Decisions(
            actions=arrays["actions"].astype(np.str_),
            reasons=arrays["reasons"].astype(np.str_),
            scores=arrays["scores"].astype(np.float64),
        ),
        latents=arrays["latents"].astype(np.float32),
        seconds=arrays["seconds"].astype(np.float64),
    )


def without_latents(sampled: Sampled) -> Sampled:
    """Return the same without the latents of every step, which only comparing takes."""
    nothing = np.zeros((0, *sampled.trajectory.latents.shape[1:]), np.float32)
    return replace(sampled, trajectory=replace(sampled.trajectory, latents=nothing))
