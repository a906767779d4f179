"""The bench's table: what was measured of each policy, as one row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.quality.bench_options import BenchOptions
from adacorr_deploy.quality.bench_sampling import Sampled
from adacorr_deploy.quality.features import FeatureSource
from adacorr_deploy.quality.manifold import bootstrap_precision
from adacorr_deploy.quality.metrics import (
    SSIM_WINDOW,
    BootstrapInterval,
    bootstrap_frechet,
    bootstrap_frechet_ratio,
    feature_distance_per_image,
    feature_statistics,
    psnr_db,
    psnr_per_image,
    ssim_per_image,
)
from adacorr_deploy.quality.tune_search import pareto_front

Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScores:
    """How a policy's samples compare as a set, each number with its 95 % bootstrap interval.

    Attributes:
        samples: How many there are.
        frechet: Fréchet distance of their features to those of real images; None without any.
        frechet_ratio: The same ÷ that of the uncached samples, pair by pair: 1 is no loss.
        frechet_uncached: Fréchet distance to the features of the uncached samples of the same seeds.
        precision: Share of the samples inside the manifold of the uncached samples (`manifold`).
        recall: Share of the uncached samples inside the manifold of the samples.
        precision_real: As `precision`, of real images; None where their features aren't kept one by one.
        recall_real: As `recall`, of real images.
    """

    samples: int
    frechet: BootstrapInterval | None
    frechet_ratio: BootstrapInterval | None
    frechet_uncached: BootstrapInterval
    precision: BootstrapInterval
    recall: BootstrapInterval
    precision_real: BootstrapInterval | None
    recall_real: BootstrapInterval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One policy. Numbers are NaN where nothing was measured.

    Attributes:
        policy: Its name.
        steps: Steps that the sampler took.
        seconds: Median over the rounds of the time for all images.
        speedup: Median over the rounds of uncached time ÷ time.
        rho: Share of block launches skipped (for `fewer-steps`: of those that the asked steps would take).
        efficiency: speedup ÷ ideal speed-up, the time with ρ of the uncached block time removed.
        psnr_db: Mean of the PSNR against the uncached image, over the images that differ; infinite if none does.
        psnr_worst_db: The lowest of them.
        ssim: Mean over images, or clips' frames; NaN where they are smaller than SSIM's window of 11.
        feature_distance: Mean over images, in [0, 4] (`metrics.feature_distance_per_image`).
        flops: Operations per image.
        flops_saved: Share of the uncached run's operations that were not done; below 0 if more were.
        baseline: The `fewer-steps` row that takes as long, or empty.
        gain_db: psnr_db − the baseline's.
        pairs_with: Of a `fewer-steps` row, the policies whose time it was chosen to match, with commas between.
        sets: Of features of many samples, if they were asked for.
        error: Why the policy could not be measured, or empty.
    """

    policy: str
    steps: int
    seconds: float = math.nan
    speedup: float = math.nan
    rho: float = math.nan
    efficiency: float = math.nan
    psnr_db: float = math.nan
    psnr_worst_db: float = math.nan
    ssim: float = math.nan
    feature_distance: float = math.nan
    flops: float = math.nan
    flops_saved: float = math.nan
    baseline: str = ""
    gain_db: float = math.nan
    pairs_with: str = ""
    sets: SetScores | None = None
    error: str = ""


@dataclass(slots=True, kw_only=True)
class PolicyRun:
    """Everything measured of one policy.

    Attributes:
        seconds: Time for all images, of each round.
        uncached_seconds: The uncached run's time in the same rounds.
        pairs_with: Names of the policies whose time this baseline was chosen to match.
        error: Why it failed, or empty.
    """

    policy: Policy
    sampled: Sampled | None = None
    seconds: list[float] = field(default_factory=list)
    uncached_seconds: list[float] = field(default_factory=list)
    baseline: str = ""
    pairs_with: list[str] = field(default_factory=list)
    sets: SetScores | None = None
    error: str = ""

    @property
    def speedup(self) -> float:
        """Median over the rounds of uncached time ÷ time; NaN without a round."""
        ratios = [base / own for base, own in zip(self.uncached_seconds, self.seconds, strict=True)]
        return statistics.median(ratios) if ratios else math.nan


def row_of_run(run: PolicyRun, uncached: Sampled, options: BenchOptions, *, block_share: float) -> BenchRow:
    """Return a policy's row; of a policy that failed, one with its error alone."""
    steps = run.policy.sampled_steps(options.steps)
    if run.error or run.sampled is None:
        return BenchRow(policy=run.policy.name, steps=steps, pairs_with=", ".join(run.pairs_with), error=run.error)
    mine = run.sampled
    large = min(mine.latents.shape[-2:]) >= SSIM_WINDOW
    flops, base = (math.nan if made.flops is None else made.flops for made in (mine, uncached))
    return BenchRow(
        policy=run.policy.name,
        steps=steps,
        seconds=statistics.median(run.seconds),
        speedup=run.speedup,
        rho=mine.rho,
        efficiency=run.speedup * (1 - mine.rho * block_share),
        psnr_db=psnr_db(mine.latents, uncached.latents),
        psnr_worst_db=float(psnr_per_image(mine.latents, uncached.latents).min()),
        ssim=float(ssim_per_image(_frames(mine.latents), _frames(uncached.latents)).mean()) if large else math.nan,
        feature_distance=_feature_distance(mine, uncached),
        flops=flops,
        flops_saved=1 - flops / base if base else math.nan,
        baseline=run.baseline,
        pairs_with=", ".join(run.pairs_with),
        sets=run.sets,
    )


def _frames(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return images (N, C, H, W) as they are, and of clips (N, C, F, H, W) every frame, (N·F, C, H, W)."""
    channels, *_, height, width = latents.shape[1:]
    clips = latents.reshape(len(latents), channels, -1, height, width)
    return clips.swapaxes(1, 2).reshape(-1, channels, height, width)


def _feature_distance(mine: Sampled, uncached: Sampled) -> float:
    if mine.features is None or uncached.features is None:
        return math.nan
    return float(feature_distance_per_image(mine.features, uncached.features).mean())


def set_scores(
    features: NDArray[np.float32], uncached: NDArray[np.float32], labels: NDArray[np.int64], source: FeatureSource
) -> SetScores:
    """Compare the features of a policy's samples with the uncached samples' and with real images'.

    Args:
        features: (N, F).
        uncached: (N, F), row by row of the same labels and seeds.
        labels: (N,) classes that were asked for: resampling keeps their counts.
        source: The network, and the real images' features.

    Raises:
        RequestError: If the features don't go together, or are not finite.
    """
    real = source.real
    to_real = ratio = precision_real = recall_real = None
    if real is not None:
        to_real = bootstrap_frechet(features, real.statistics, labels=labels)
        ratio = bootstrap_frechet_ratio(features, uncached, real.statistics, labels=labels)
        if real.features is not None:
            precision_real = bootstrap_precision(features, real.features, labels=labels)
            recall_real = bootstrap_precision(real.features, features)
    return SetScores(
        samples=len(features),
        frechet=to_real,
        frechet_ratio=ratio,
        frechet_uncached=bootstrap_frechet(features, feature_statistics(uncached), labels=labels),
        precision=bootstrap_precision(features, uncached, labels=labels),
        recall=bootstrap_precision(uncached, features, labels=labels),
        precision_real=precision_real,
        recall_real=recall_real,
    )


_NUMBERS: Final = (
    "steps", "seconds", "speedup", "rho", "efficiency", "psnr_db", "ssim", "psnr_worst_db", "feature_distance", "flops",
    "flops_saved", "gain_db",
)  # fmt: skip
_TEXTS: Final = ("baseline", "pairs_with", "error")
_INTERVALS: Final = (
    "frechet", "frechet_ratio", "frechet_uncached", "precision", "recall", "precision_real", "recall_real",
)  # fmt: skip
COLUMNS: Final = (
    "policy",
    *_NUMBERS,
    *_TEXTS,
    "samples",
    *(f"{name}{end}" for name in _INTERVALS for end in ("", "_low", "_high")),
)


def cells_of_row(row: BenchRow) -> dict[str, Cell]:
    """Return a row by column, always all of them: what has no finite value, and what was not measured, is None."""
    cells: dict[str, Cell] = {"policy": row.policy}
    numbers: dict[str, float] = {name: getattr(row, name) for name in _NUMBERS}
    cells |= {name: number if math.isfinite(number) else None for name, number in numbers.items()}
    texts: dict[str, str] = {name: getattr(row, name) for name in _TEXTS}
    cells |= {name: text or None for name, text in texts.items()}
    cells["samples"] = row.sets.samples if row.sets is not None else None
    for name in _INTERVALS:
        interval: BootstrapInterval | None = getattr(row.sets, name) if row.sets is not None else None
        ends = (interval.value, interval.low, interval.high) if interval is not None else (None, None, None)
        cells |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    return cells


def best_by_speed(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Return the Pareto front of speed-up and PSNR, slowest first: rows that no other beats in both."""
    return pareto_front([row for row in rows if math.isfinite(row.speedup) and not math.isnan(row.psnr_db)])
