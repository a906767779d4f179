"""From adacorr-build's options for compiled engines to what the compiler takes."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from adacorr_deploy.core.engine_build import MAX_SIZE, CompilerOptions, Profile, WeightLayout


def compiler_options(
    gpu: str | None,
    batch: str | None,
    max_steps: int | None,
    weights: WeightLayout | None,
    version_compatible: bool,
    timing_cache: Path | None,
) -> CompilerOptions | None:
    """Return what a user asks of the compiler, or None for nothing: not every backend has one.

    Raises:
        typer.BadParameter: If `batch` is not three sizes in order.
    """
    if not version_compatible and all(option is None for option in (gpu, batch, max_steps, weights, timing_cache)):
        return None
    defaults = Profile()
    most = max_steps or defaults.steps[-1]
    try:
        profile = Profile(
            batch=_three_sizes(batch) if batch is not None else defaults.batch,
            steps=(1, min(defaults.steps[1], most), most),
        )
    except ValueError as error:
        raise typer.BadParameter(
            f"{batch!r} is not three sizes of 1 to {MAX_SIZE}, the fewest first, as 1,8,16.", param_hint="--batch"
        ) from error
    return CompilerOptions(
        profile=profile,
        targets=tuple(gpu.split(",")) if gpu is not None else (),
        weights=weights or WeightLayout.BAKED,
        version_compatible=version_compatible,
        timing_cache=timing_cache,
    )


def _three_sizes(text: str) -> tuple[int, int, int]:
    sizes = re.fullmatch(r"([0-9]{1,4}),([0-9]{1,4}),([0-9]{1,4})", text)
    if sizes is None:
        raise ValueError(text)
    return int(sizes[1]), int(sizes[2]), int(sizes[3])
