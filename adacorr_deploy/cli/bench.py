"""adacorr-bench: policies side by side on one bundle."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from adacorr_deploy.cli.console import Cell, progress_bar, show_json, show_lines, show_table
from adacorr_deploy.cli.errors import run_app
from adacorr_deploy.cli.options import (
    MAX_IMAGES,
    POLICY_NAMES,
    Guidance,
    Json,
    RunBackend,
    SamplerName,
    Seed,
    Steps,
    command_app,
    documented,
    path_from_text,
)
from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.samplers import Sampler

if TYPE_CHECKING:
    from pydantic import BaseModel

    from adacorr_deploy.caching.policy import Policy
    from adacorr_deploy.quality.bench import BenchOptions, BenchRow
    from adacorr_deploy.runtime import Pipeline

_POLICIES: Final = "none,fewer-steps@2,fora,scheduled@2,robust@2"
_COLUMNS: Final = ("policy", "steps", "seconds", "speedup", "rho", "efficiency", "psnr_db", "ssim")

app = command_app()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    run_app(app, arguments)


@documented(
    app,
    "adacorr-bench --list",
    "adacorr-bench demo.bundle",
    "adacorr-bench demo.bundle --policies fewer-steps@2.5,robust@2.5,mine.toml --images 32",
    "adacorr-bench demo.bundle --rounds 5 --csv results.csv",
)
def bench(  # noqa: PLR0913, PLR0917  one parameter is one option
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE", help="Folder that adacorr-build made.", parser=path_from_text, show_default=False
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            metavar="NAMES",
            help=f"With commas between, each: {POLICY_NAMES} none is always run.",
        ),
    ] = _POLICIES,
    images: Annotated[int, typer.Option("--images", metavar="N", min=1, max=10_000, help="Images per policy.")] = 16,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, max=MAX_IMAGES, help="Images per request.")] = 8,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, max=1000, help="Timed runs; the medians count.")
    ] = 3,
    steps: Steps = 50,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    sampler: SamplerName = Sampler.DDIM,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", parser=path_from_text, help="Keep the rows as CSV too.", show_default=False
        ),
    ] = None,
    backend: RunBackend = None,
    list_presets: Annotated[
        bool, typer.Option("--list", metavar="", help="Show the preset policies, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare policies on a bundle: time, share of block launches skipped, and closeness to the uncached images.

    All policies take turns in each round, so that a drift of the machine's speed touches all alike. speedup is the
    median over the rounds of none's time ÷ the policy's in the same round; rho is the share of block launches skipped,
    of those that the asked steps would take; efficiency is speedup ÷ the ideal one at that rho; psnr_db and ssim are
    against none's images (– where they are identical, or too small for SSIM), for values from -1 to 1: for a model of
    latents too, whatever range they really have.
    """
    if list_presets:
        _show_presets(as_json)
        return
    if bundle is None:
        raise typer.BadParameter("it is missing. Give a bundle's folder, or --list.", param_hint="BUNDLE")
    from adacorr_deploy.quality.bench import BenchOptions

    options = BenchOptions(
        images=images, batch=batch, rounds=rounds, steps=steps, guidance=guidance, seed=seed, sampler=sampler
    )
    rows = [_cells(row) for row in _measured(bundle, policies, options, csv_file, backend)]
    if csv_file is not None:
        _write_csv(csv_file, rows)
    if as_json:
        show_json(rows)
    else:
        show_table(_COLUMNS, [tuple(row.values()) for row in rows])
        show_lines(*([f"rows: {csv_file}"] if csv_file is not None else []))


def _measured(
    bundle: Path, policies: str, options: BenchOptions, csv_file: Path | None, backend: str | None
) -> list[BenchRow]:
    """Measure, after checking everything that could spoil it later."""
    from adacorr_deploy.caching.policy import policy_named
    from adacorr_deploy.cli.output_files import check_outputs
    from adacorr_deploy.quality.bench import bench
    from adacorr_deploy.runtime import Pipeline

    names = dict.fromkeys(name.strip() for name in policies.split(",") if name.strip())
    if not names:
        raise RequestError("policies is empty. Give at least one name; adacorr-bench --list shows them.")
    if csv_file is not None:
        check_outputs([csv_file], bundle=bundle, inputs=[Path(name) for name in names])
    chosen = [policy_named(name) for name in names]
    with Pipeline.open(bundle, backend=backend) as pipeline:
        _check_runs(pipeline, chosen, options)
        with progress_bar() as advance:
            return bench(pipeline, chosen, options, advance)


def _check_runs(pipeline: Pipeline, policies: Sequence[Policy], options: BenchOptions) -> None:
    """Refuse before anything is timed what a policy would refuse in its turn."""
    from adacorr_deploy.quality.bench import requests
    from adacorr_deploy.runtime import check_request, controller_for_request

    first, *others = requests(pipeline, options)
    for request in others:
        check_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    for policy in policies:
        controller_for_request(pipeline, first, policy)


def _cells(row: BenchRow) -> dict[str, Cell]:
    """Return a row by column; what has no finite value (the PSNR of identical images) is None."""
    cells: dict[str, Cell] = {name: getattr(row, name) for name in _COLUMNS}
    return {name: None if isinstance(cell, float) and not math.isfinite(cell) else cell for name, cell in cells.items()}


def _write_csv(path: Path, rows: Sequence[Mapping[str, Cell]]) -> None:
    from adacorr_deploy.cli.output_files import write_files

    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_files({path: text.getvalue().encode()})


def _show_presets(as_json: bool) -> None:
    from adacorr_deploy.caching.policy import PRESETS

    if as_json:
        show_json(
            [
                {**policy.model_dump(mode="json", by_alias=True), "needs_calibration": policy.needs_calibration}
                for policy in PRESETS.values()
            ]
        )
        return
    show_table(
        ("policy", "gate", "predictor", "guards", "decides by", "needs calibration"),
        [
            (
                policy.name,
                _fields(policy.gate),
                *_caching(policy),
                policy.placement.value if policy.placement is not None else None,
                "yes" if policy.needs_calibration else "no",
            )
            for policy in PRESETS.values()
        ],
    )


def _fields(model: BaseModel) -> str:
    """Return a policy's piece in one line: its kind, then its settings; lists that are empty say nothing."""
    settings = model.model_dump(mode="json", by_alias=True)
    kind = [settings.pop("kind")] if "kind" in settings else []
    return ", ".join([*kind, *(f"{name} {value}" for name, value in settings.items() if value not in (None, []))])


def _caching(policy: Policy) -> tuple[str, str]:
    """Return predictor and guards; nothing for policies that cache nothing."""
    from adacorr_deploy.caching.policy import FewerStepsGate, NoGate

    if isinstance(policy.gate, NoGate | FewerStepsGate):
        return "–", "–"
    return policy.predictor.label, _fields(policy.guards)
