"""The public caches in PyTorch beside ours, on the same model, images, noise and steps, in one run on a CPU.

    pip install -c tools/constraints.txt -e '.[bench]'
    python tools/benchmarks/peers.py demo.bundle --policies fewer-steps@2,scheduled@2,robust@2.1 -o build/peers.json

diffusers' hooks (FirstBlockCache, MagCache, TaylorSeer) and cache-dit run the model that the bundle was built from with
diffusers' scheduler. diffusers' hooks know only the block classes of its own registry, and DiT's is not among them: it
is registered here, from outside. Quality is PSNR against the uncached run of the same side; times are medians of rounds
in which every arm runs in turn. `evaluated` is the share of attention and MLP modules that ran.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from diffusers.models.attention import BasicTransformerBlock
from machine import cpu_model, say
from numpy.typing import NDArray

import adacorr_deploy
from adacorr_deploy.caching.policy import Policy, policy_named
from adacorr_deploy.caching.profile import Quantity
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.exporters import LoadedModel, load_checkpoint
from adacorr_deploy.exporters.dit_adapter import DiTModel
from adacorr_deploy.quality.metrics import psnr_db, psnr_per_image
from adacorr_deploy.quality.profile import ProfileOptions, profile
from adacorr_deploy.quality.reference import diffusers_latents, initial_latents
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy

if TYPE_CHECKING:
    import cache_dit

Latents = NDArray[np.float32]
UNCACHED: Final = "diffusers, uncached"
UNCACHED_OURS: Final = "none"
MODULES: Final = r"transformer_blocks\.\d+\.(attn1|ff)"  # both halves of every block
FIRST_SEED: Final = 7_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    latents: Latents
    evaluated: float  # share of the blocks' modules that ran, of those of all asked steps
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to sample a request."""

    name: str
    baseline: str  # whose images and time are compared with
    sample: Callable[[SampleRequest], Sampled]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm's figures."""

    arm: str
    evaluated: float
    psnr_db: float | None  # None where no image differs
    psnr_worst_db: float | None
    seconds: float
    speedup: float  # over the uncached run of the same side
    speedup_over_diffusers: float


# --- Peers -----------------------------------------------------------------------------------------------------------


class PeerModel:
    """A copy of the model with one peer's cache attached, which counts what it evaluates."""

    def __init__(
        self,
        pipeline: Pipeline,
        loaded: LoadedModel,
        attach: Callable[[DiTTransformer2DModel], None],
        reset: Callable[[DiTTransformer2DModel], None],
    ) -> None:
        self._pipeline = pipeline
        self._model = DiTModel(copy.deepcopy(loaded.model.module))
        self._loaded = replace(loaded, model=self._model)
        self._runs = 0
        self._reset = reset
        blocks = self._model.module.transformer_blocks
        self._modules = 2 * len(blocks)
        for block in blocks:  # the innermost modules: what a cache skips doesn't reach them
            block.attn1.to_q.register_forward_hook(self._count)
            block.ff.net[0].register_forward_hook(self._count)
        attach(self._model.module)

    def _count(self, *arguments: object) -> None:
        self._runs += 1

    def sample(self, request: SampleRequest) -> Sampled:
        manifest = self._pipeline.manifest
        latents = initial_latents(self._pipeline, request)
        self._reset(self._model.module)
        self._runs = 0
        started = time.perf_counter()
        result = diffusers_latents(self._loaded, manifest.schedule, request, latents)
        seconds = time.perf_counter() - started
        return Sampled(latents=result, evaluated=self._runs / (self._modules * request.steps), seconds=seconds)


def register_block() -> None:
    """Tell diffusers' hooks where DiT's block takes and returns its tokens."""
    metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    TransformerBlockRegistry.register(BasicTransformerBlock, metadata)


def reset_hooks(module: DiTTransformer2DModel) -> None:
    """Begin a request: both guidance branches stand in one batch, so there is one context."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.reset_stateful_hooks()
    registry.invalidate_child_registries_cache()
    _set_cache_context(module, CacheContext("batch"))


def diffusers_arms(pipeline: Pipeline, loaded: LoadedModel, args: argparse.Namespace) -> Iterator[Arm]:
    def arm(name: str, attach: Callable[[DiTTransformer2DModel], None]) -> Arm:
        return Arm(name=name, baseline=UNCACHED, sample=PeerModel(pipeline, loaded, attach, reset_hooks).sample)

    register_block()
    yield arm(UNCACHED, lambda module: None)
    for threshold in (0.05, 0.1, 0.15, 0.2, 0.3):
        first_block = FirstBlockCacheConfig(threshold=threshold)
        yield arm(
            f"diffusers FirstBlockCache {threshold:g}",
            lambda module, config=first_block: apply_first_block_cache(module, config),  # type: ignore[misc]
        )
    ratios = magnitude_ratios(pipeline, args)
    for threshold in (0.06, 0.12, 0.24, 0.48):
        magnitude = MagCacheConfig(threshold=threshold, num_inference_steps=args.steps, mag_ratios=ratios)
        yield arm(
            f"diffusers MagCache {threshold:g}",
            lambda module, config=magnitude: apply_mag_cache(module, config),  # type: ignore[misc]
        )
    for interval in (2, 3, 4):
        taylor = TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[MODULES],
        )
        yield arm(
            f"diffusers TaylorSeer n={interval}",
            lambda module, config=taylor: apply_taylorseer_cache(module, config),  # type: ignore[misc]
        )


def magnitude_ratios(pipeline: Pipeline, args: argparse.Namespace) -> list[float]:
    """Return the ratios that MagCache needs, of this model: measured as its own calibration does, over more images."""
    wanted = frozenset({Quantity.MAGNITUDE_RATIOS})
    measured = profile(pipeline, ProfileOptions(steps=args.steps, guidance=args.guidance, images=8, quantities=wanted))
    return list(measured.magnitude_ratios or ())


def cache_dit_arms(pipeline: Pipeline, loaded: LoadedModel, args: argparse.Namespace) -> Iterator[Arm]:
    if find_spec("cache_dit") is None:
        say("cache-dit is not installed and is left out. Install the bench extra.")
        return
    import cache_dit

    for first_blocks, threshold, order in (
        (1, 0.1, 0),
        (1, 0.2, 0),
        (1, 0.1, 1),
        (1, 0.2, 1),
        (4, 0.1, 1),
        (4, 0.2, 1),
        (4, 0.3, 1),
    ):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=first_blocks,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=2,
            num_inference_steps=args.steps,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        name = f"cache-dit F{first_blocks} {threshold:g}" + (f" TaylorSeer-{order}" if order else "")
        peer = PeerModel(pipeline, loaded, attach_cache_dit(config, calibrator), reset_cache_dit(config, calibrator))
        yield Arm(name=name, baseline=UNCACHED, sample=peer.sample)


def attach_cache_dit(
    config: cache_dit.DBCacheConfig, calibrator: cache_dit.TaylorSeerCalibratorConfig | None
) -> Callable[[DiTTransformer2DModel], None]:
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    def attach(module: DiTTransformer2DModel) -> None:
        adapter = cache_dit.BlockAdapter(
            transformer=module,
            blocks=module.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
            check_forward_pattern=True,
            has_separate_cfg=False,
        )
        cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)

    return attach


def reset_cache_dit(
    config: cache_dit.DBCacheConfig, calibrator: cache_dit.TaylorSeerCalibratorConfig | None
) -> Callable[[DiTTransformer2DModel], None]:
    import cache_dit

    def reset(module: DiTTransformer2DModel) -> None:
        cache_dit.refresh_context(module, cache_config=config, calibrator_config=calibrator)

    return reset


# --- Ours ------------------------------------------------------------------------------------------------------------


def our_arms(pipeline: Pipeline, policies: Sequence[str]) -> Iterator[Arm]:
    for name in (UNCACHED_OURS, *policies):
        yield Arm(name=name, baseline=UNCACHED_OURS, sample=sampled_with(pipeline, policy_named(name)))


def sampled_with(pipeline: Pipeline, policy: Policy) -> Callable[[SampleRequest], Sampled]:
    def sample(request: SampleRequest) -> Sampled:
        result = sample_with_policy(pipeline, request, policy)
        return Sampled(latents=result.latents, evaluated=1 - result.rho, seconds=result.seconds)

    return sample


# --- The run ---------------------------------------------------------------------------------------------------------


def requests(pipeline: Pipeline, args: argparse.Namespace) -> list[SampleRequest]:
    classes = pipeline.manifest.model.num_classes
    return [
        SampleRequest(
            labels=tuple(image % classes for image in range(first, min(first + args.batch, args.images))),
            steps=args.steps,
            guidance=args.guidance,
            seed=FIRST_SEED + first,
            sampler=Sampler.DDIM,
        )
        for first in range(0, args.images, args.batch)
    ]


def measure(arms: Sequence[Arm], asked: Sequence[SampleRequest], rounds: int) -> list[Row]:
    """Run every arm on every request in turn; the first round warms up and gives the images."""
    images: dict[str, Latents] = {}
    evaluated: dict[str, float] = {}
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for round_index in range(rounds + 1):
        for arm in arms:
            results = [arm.sample(request) for request in asked]
            if round_index == 0:
                images[arm.name] = np.concatenate([result.latents for result in results])
                evaluated[arm.name] = statistics.fmean(result.evaluated for result in results)
            else:
                seconds[arm.name].append(sum(result.seconds for result in results))
            print(f"\rround {round_index} of {rounds}: {arm.name:45}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [row(arm, images, evaluated, seconds) for arm in arms]


def row(arm: Arm, images: dict[str, Latents], evaluated: dict[str, float], seconds: dict[str, list[float]]) -> Row:
    def speedup(baseline: str) -> float:
        return statistics.median(base / own for base, own in zip(seconds[baseline], seconds[arm.name], strict=True))

    same = arm.name == arm.baseline
    mine, reference = images[arm.name], images[arm.baseline]
    return Row(
        arm=arm.name,
        evaluated=evaluated[arm.name],
        psnr_db=None if same else psnr_db(mine, reference),
        psnr_worst_db=None if same else float(psnr_per_image(mine, reference).min()),
        seconds=statistics.median(seconds[arm.name]),
        speedup=speedup(arm.baseline),
        speedup_over_diffusers=speedup(UNCACHED),
    )


def show(rows: Sequence[Row]) -> None:
    print(f"{'arm':40} evaluated  PSNR dB  worst  speed-up  over diffusers")
    for each in rows:
        psnr = "      –      –" if each.psnr_db is None else f"{each.psnr_db:7.1f} {each.psnr_worst_db:6.1f}"
        print(f"{each.arm:40} {each.evaluated:9.3f}  {psnr}  {each.speedup:8.2f}  {each.speedup_over_diffusers:14.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, default=Path(adacorr_deploy.__file__).parent / "demo", help="checkpoint")
    parser.add_argument("--policies", default="fewer-steps@2,fora@2,scheduled@1.6,scheduled@2,robust@1.6,robust@2.1")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="JSON file")
    args = parser.parse_args()
    logging.disable(logging.INFO)  # cache-dit tells of every module that it wraps
    loaded = load_checkpoint(args.model)
    with Pipeline.open(args.bundle) as pipeline:
        arms = [
            *diffusers_arms(pipeline, loaded, args),
            *cache_dit_arms(pipeline, loaded, args),
            *our_arms(pipeline, args.policies.split(",")),
        ]
        rows = measure(arms, requests(pipeline, args), args.rounds)
    show(rows)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"cpu": cpu_model(), "rows": [asdict(each) for each in rows]}
        args.output.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
