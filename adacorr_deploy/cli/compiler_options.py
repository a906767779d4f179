"""From adacorr-build's options for compiled engines to what the compiler takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import typer

from adacorr_deploy.core.engine_build import MAX_SIZE, CompilerOptions, Profile, WeightLayout


def compiler_options(
    gpu: str | None,
    batch: str | None,
    max_steps: int | None,
    weights: WeightLayout | None,
    version_compatible: bool,
    timing_cache: Path | None,
    sizes: Mapping[str, str | None] = MappingProxyType({}),
) -> CompilerOptions | None:
    """Return what a user asks of the compiler, or None for nothing: not every backend has one.

    Raises:
        typer.BadParameter: If `batch`, or one of the latents' `sizes`, by axis, is not three sizes in order.
    """
    given = (gpu, batch, max_steps, weights, timing_cache, *sizes.values())
    if not version_compatible and all(option is None for option in given):
        return None
    defaults = Profile()
    most = max_steps or defaults.steps[-1]
    profile = Profile(
        batch=_three_sizes(batch, "batch") if batch is not None else defaults.batch,
        steps=(1, min(defaults.steps[1], most), most),
        sizes={axis: _three_sizes(text, axis) for axis, text in sizes.items() if text is not None},
    )
    return CompilerOptions(
        profile=profile,
        targets=tuple(gpu.split(",")) if gpu is not None else (),
        weights=weights or WeightLayout.BAKED,
        version_compatible=version_compatible,
        timing_cache=timing_cache,
    )


def _three_sizes(text: str, option: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"([0-9]{1,4}),([0-9]{1,4}),([0-9]{1,4})", text)
    low, tuned, high = (int(size) for size in found.groups()) if found is not None else (0, 0, 0)
    if not 1 <= low <= tuned <= high <= MAX_SIZE:
        raise typer.BadParameter(
            f"{text!r} is not three sizes of 1 to {MAX_SIZE}, the smallest first, as 1,8,16.", param_hint=f"--{option}"
        )
    return low, tuned, high
