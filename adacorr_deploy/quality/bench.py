"""Policies side by side: the same images on the same bundle, in turns, against the uncached run of the same round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import PRESETS, Policy
from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.samplers import Sampler, sampler_table
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import DType
from adacorr_deploy.quality.memory_need import require_memory
from adacorr_deploy.quality.metrics import SSIM_WINDOW, psnr_db, psnr_per_image, ssim_per_image
from adacorr_deploy.runtime import (
    Pipeline,
    SampleRequest,
    SampleResult,
    check_request,
    controller_for_request,
    sample_with_policy,
)
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.pipeline import WORKSPACES_KEPT
from adacorr_deploy.runtime.request import NoiseStream, check_integer
from adacorr_deploy.runtime.workspace import workspace_bytes

MAX_IMAGES: Final = 1_000_000
MAX_ROUNDS: Final = 1000
_UNCACHED: Final = PRESETS["none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is sampled.

    Attributes:
        images: Images per policy; labels go round the classes.
        batch: Images per request.
        rounds: How often every policy is timed; the medians count.

    Raises:
        RequestError: If one of these is not positive, or beyond any use.
    """

    images: int = 16
    batch: int = 8
    rounds: int = 3
    steps: int = 50
    guidance: float = 4.0
    seed: int = 0
    sampler: Sampler = Sampler.DDIM

    def __post_init__(self) -> None:
        for name, most in (("images", MAX_IMAGES), ("batch", MAX_BATCH), ("rounds", MAX_ROUNDS)):
            check_integer(name, getattr(self, name), 1, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One policy.

    Attributes:
        policy: Its name.
        steps: Steps that the sampler took.
        seconds: Median over the rounds of the time for all images.
        speedup: Median over the rounds of uncached time ÷ time.
        rho: Share of block launches skipped (for `fewer-steps`: of those that the asked steps would take).
        efficiency: speedup ÷ ideal speed-up, the time with ρ of the uncached block time removed.
        psnr_db: Mean of the PSNR against the uncached image, over the images that differ; infinite if none does.
        psnr_worst_db: The lowest of them.
        ssim: Mean over images; NaN where they are smaller than SSIM's window of 11.
    """

    policy: str
    steps: int
    seconds: float
    speedup: float
    rho: float
    efficiency: float
    psnr_db: float
    psnr_worst_db: float
    ssim: float


@dataclass(slots=True)
class _Runs:
    latents: NDArray[np.float32]
    rho: float
    seconds: list[float]


def bench(
    pipeline: Pipeline, policies: Sequence[Policy], options: BenchOptions, progress: Progress | None = None
) -> list[BenchRow]:
    """Measure policies against the uncached run.

    Each round samples all images with every policy in turn, the uncached run first, so that a drift of the machine's
    speed touches all alike. The first round gives the images and is not counted.

    Raises:
        RequestError: If an option is out of range, two different policies have one name, or this machine has not the
            memory.
        CalibrationError: If a policy needs a calibration that the bundle doesn't hold.
    """
    chosen = _distinct([_UNCACHED, *policies])
    _check_runs(pipeline, chosen, options)
    total, done = len(chosen) * (options.rounds + 1), 0
    runs: dict[str, _Runs] = {}
    for round_index in range(options.rounds + 1):
        for policy in chosen:
            if progress is not None:
                progress(policy.name, done, total)
            results, seconds = _sample_all(pipeline, policy, options)
            done += 1
            if round_index == 0:
                latents = np.concatenate([result.latents for result in results])
                runs[policy.name] = _Runs(latents, statistics.fmean(result.rho for result in results), [])
            else:
                runs[policy.name].seconds.append(seconds)
    block_share = _block_share(pipeline, options)
    if progress is not None:
        progress("", total, total)
    return [_row(policy, runs, block_share, options) for policy in chosen]


def _check_runs(pipeline: Pipeline, policies: Sequence[Policy], options: BenchOptions) -> None:
    """Refuse before anything is timed what a policy or the last request would refuse in its turn."""
    made = list(requests(pipeline, options))
    first, last = made[0], made[-1]
    check_request(last, pipeline.manifest.model, pipeline.manifest.schedule)  # its seed is the largest
    for policy in policies:
        controller_for_request(pipeline, first, policy)
    _check_memory(pipeline, policies, first, options)


def _check_memory(pipeline: Pipeline, policies: Sequence[Policy], first: SampleRequest, options: BenchOptions) -> None:
    """Refuse if the largest run sizes that a pipeline keeps, and every policy's latents, don't fit into memory."""
    model = pipeline.manifest.model
    sizes = {
        RunSize.of(
            replace(first, steps=policy.sampled_steps(first.steps)),
            history=policy.history,
            whole_steps=policy.predictor.whole_step,
        )
        for policy in policies
    }
    spaces = sorted(workspace_bytes(model, size) for size in sizes)[-WORKSPACES_KEPT:]
    latents = DType.FLOAT32.numpy.itemsize * options.images * math.prod(model.latent_shape)
    require_memory(
        sum(spaces) + len(policies) * latents,
        what=f"Sampling {options.images} images of {options.steps} steps in batches of {first.batch}",
        lower="--batch" if sum(spaces) > len(policies) * latents else "--images",
    )


def _distinct(policies: Sequence[Policy]) -> list[Policy]:
    """Return each policy once: rows go by name."""
    named: dict[str, Policy] = {}
    for policy in policies:
        if named.setdefault(policy.name, policy) != policy:
            raise RequestError(f"two different policies are named {policy.name}. Give one of them another name.")
    return list(named.values())


def requests(pipeline: Pipeline, options: BenchOptions) -> Iterator[SampleRequest]:
    """Yield the requests that make all images: seeds count up by request, labels go round the classes."""
    classes = pipeline.manifest.model.num_classes
    for first in range(0, options.images, options.batch):
        count = min(options.batch, options.images - first)
        yield SampleRequest(
            labels=tuple((first + index) % classes for index in range(count)),
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed + first,
            sampler=options.sampler,
        )


def _sample_all(pipeline: Pipeline, policy: Policy, options: BenchOptions) -> tuple[list[SampleResult], float]:
    # A pipeline keeps few run sizes allocated: what this policy's needs is allocated and bound before the clock starts.
    sample_with_policy(pipeline, next(requests(pipeline, options)), policy)
    started = time.perf_counter()
    results = [sample_with_policy(pipeline, request, policy) for request in requests(pipeline, options)]
    return results, time.perf_counter() - started


def _block_share(pipeline: Pipeline, options: BenchOptions) -> float:
    """Return the share of an uncached step's time that its blocks take: the median of single steps, 0 … 1."""
    request = next(requests(pipeline, options))
    size = RunSize.of(request, history=0, whole_steps=False)
    table = sampler_table(pipeline.manifest.schedule, request.sampler, request.steps)
    with pipeline.lease(size, keeps_reference=lambda block: False) as (space, slots):
        space.prepare(request, table, NoiseStream(request, pipeline.manifest.model.latent_shape).at(0))
        shares = []
        for _ in range(9):
            started = time.perf_counter()
            space.embed(0)
            before_blocks = time.perf_counter()
            for block, slot in enumerate(slots):
                space.evaluate(block, slot)
            after_blocks = time.perf_counter()
            space.head(0, None)
            shares.append((after_blocks - before_blocks) / (time.perf_counter() - started))
    return statistics.median(shares)


def _row(policy: Policy, runs: dict[str, _Runs], block_share: float, options: BenchOptions) -> BenchRow:
    mine, uncached = runs[policy.name], runs[_UNCACHED.name]
    speedup = statistics.median(base / own for base, own in zip(uncached.seconds, mine.seconds, strict=True))
    large = min(mine.latents.shape[2:]) >= SSIM_WINDOW
    return BenchRow(
        policy=policy.name,
        steps=policy.sampled_steps(options.steps),
        seconds=statistics.median(mine.seconds),
        speedup=speedup,
        rho=mine.rho,
        efficiency=speedup * (1 - mine.rho * block_share),
        psnr_db=psnr_db(mine.latents, uncached.latents),
        psnr_worst_db=float(psnr_per_image(mine.latents, uncached.latents).min()),
        ssim=float(ssim_per_image(mine.latents, uncached.latents).mean()) if large else math.nan,
    )
