"""adacorr-bench: policies side by side on one bundle."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
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
    PromptFile,
    RunBackend,
    SamplerName,
    Seed,
    Steps,
    command_app,
    documented,
    path_from_text,
)
from adacorr_deploy.core.errors import RequestError

if TYPE_CHECKING:
    from adacorr_deploy.quality.bench import Bench
    from adacorr_deploy.quality.bench_options import BenchOptions
    from adacorr_deploy.quality.features import FeatureSource
    from adacorr_deploy.runtime import Pipeline

_POLICIES: Final = "none,fewer-steps@2,fora,scheduled@2,robust@2"
_SHOWN: Final = ("policy", "steps", "seconds", "speedup", "rho", "efficiency", "psnr_db", "ssim", "gain_db", "baseline")
_SHOWN_OF_SETS: Final = ("frechet", "frechet_ratio", "frechet_uncached", "precision", "recall")

POLICY_FAILED: Final = 1  # exit code of a table in which a policy's numbers are missing; 2 is for what could not begin

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
    "adacorr-bench demo.bundle --policies fora@2,robust@1.6,robust@2.1,robust@2.6 --report report.html",
    "adacorr-bench demo.bundle --samples 5000 --results build/bench --report report.html",
    "adacorr-bench my.bundle --samples 5000 --features inception.onnx --reference-features real.safetensors",
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
    images: Annotated[
        int,
        typer.Option(
            "--images", metavar="N", min=1, max=10_000, help="Images per policy, each compared with the uncached one."
        ),
    ] = 16,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, max=MAX_IMAGES, help="Images per request.")] = 8,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=1, max=1000, help="Timed runs; the medians count.")
    ] = 3,
    steps: Steps = 50,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    sampler: SamplerName = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=0,
            max=1_000_000,
            help="Images per policy whose features are compared as sets: Fréchet distance, precision and recall. "
            "Thousands are needed; 0 leaves it out.",
        ),
    ] = 0,
    features: Annotated[
        Path | None,
        typer.Option(
            "--features",
            metavar="NET.onnx",
            parser=path_from_text,
            help="Network whose features are compared: one float32 input (images, channels, height, width) in [-1, 1], "
            "one float32 output. The demo has its own.",
            show_default=False,
        ),
    ] = None,
    reference_features: Annotated[
        Path | None,
        typer.Option(
            "--reference-features",
            metavar="FILE",
            parser=path_from_text,
            help="That network's features of real images: safetensors with features (N, F), or with mean, covariance "
            "and a count. The demo has its own.",
            show_default=False,
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            "--results",
            metavar="DIR",
            parser=path_from_text,
            help="Folder for what is finished: after an interruption, or for more images, rounds, samples or policies, "
            "the same command goes on from there.",
            show_default=False,
        ),
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option(
            "--csv", metavar="FILE", parser=path_from_text, help="Keep the rows as CSV too.", show_default=False
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            parser=path_from_text,
            help="Make a page to look at: charts, decisions, images, the table. One file that needs no network.",
            show_default=False,
        ),
    ] = None,
    prompts: PromptFile = None,
    backend: RunBackend = None,
    list_presets: Annotated[
        bool, typer.Option("--list", metavar="", help="Show the preset policies, and stop.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Compare policies on a bundle: time, share of block launches skipped, and closeness to the uncached images.

    All policies take turns in each round, so that a drift of the machine's speed touches all alike. speedup is the
    median over the rounds of none's time ÷ the policy's in the same round; rho is the share of block launches skipped,
    of those that the asked steps would take; efficiency is speedup ÷ the ideal one at that rho; psnr_db and ssim are
    against none's images (– where they are identical, or too small for SSIM), for values from -1 to 1: for a model of
    latents too, whatever range they really have. baseline is the row of fewer-steps with as many steps as take the same
    time; gain_db is how far the policy's PSNR is above that one's. JSON and CSV hold more: FLOPs, distances of
    features, 95 % intervals.

    Exit code 0, 1 if a policy failed on its way (its row says why), 2 if nothing could begin.
    """
    if list_presets:
        from adacorr_deploy.cli.policy_table import show_policies

        show_policies(as_json=as_json)
        return 0
    if bundle is None:
        raise typer.BadParameter("it is missing. Give a bundle's folder, or --list.", param_hint="BUNDLE")
    from adacorr_deploy.quality.bench_options import BenchOptions
    from adacorr_deploy.quality.bench_rows import cells_of_row

    options = BenchOptions(
        images=images,
        batch=batch,
        rounds=rounds,
        steps=steps,
        guidance=guidance,
        seed=seed,
        sampler=sampler,
        samples=samples,
    )
    files = Files(
        prompts=prompts, features=features, real=reference_features, results=results, csv=csv_file, report=report
    )
    measured, page = _measured(bundle, policies, options, files, backend)
    rows = [cells_of_row(row) for row in measured.rows]
    _write(files, rows, page)
    if as_json:
        show_json(rows)
    else:
        _show_rows(rows, files)
    return POLICY_FAILED if measured.failed else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What is read beside the bundle, and where the results go."""

    prompts: Path | None
    features: Path | None
    real: Path | None
    results: Path | None
    csv: Path | None
    report: Path | None

    def check(self, bundle: Path, policies: Sequence[str]) -> None:
        """Refuse what can't be written, before anything is measured.

        Raises:
            OutputError: See `check_outputs`.
        """
        from adacorr_deploy.caching.policy import named_file
        from adacorr_deploy.cli.output_files import check_outputs

        results = self.results / "run.json" if self.results is not None else None
        inputs = [
            *map(named_file, policies),
            *(path for path in (self.prompts, self.features, self.real) if path is not None),
        ]
        outputs = [path for path in (self.csv, self.report, results) if path is not None]
        check_outputs(outputs, bundle=bundle, inputs=inputs)


def _measured(
    bundle: Path, policies: str, options: BenchOptions, files: Files, backend: str | None
) -> tuple[Bench, str]:
    """Measure, after checking everything that could spoil it later; with the report's page, if one is wanted."""
    from adacorr_deploy.caching.policy import policy_named
    from adacorr_deploy.cli.errors import needs_build_packages
    from adacorr_deploy.cli.prompts import opened_with_prompts
    from adacorr_deploy.quality.bench import bench, check_runs
    from adacorr_deploy.quality.bench_store import ResultStore, RunKey
    from adacorr_deploy.quality.features import feature_source

    names = dict.fromkeys(name.strip() for name in policies.split(",") if name.strip())
    if not names:
        raise RequestError("policies is empty. Give at least one name; adacorr-bench --list shows them.")
    files.check(bundle, list(names))
    chosen = [policy_named(name) for name in names]
    if files.report is not None:
        with needs_build_packages("adacorr-bench --report"):
            import jinja2  # noqa: F401  asked for now, not after hours of measuring
    with opened_with_prompts(bundle, backend, files.prompts) as pipeline:
        check_runs(pipeline, chosen, options)
        with needs_build_packages("adacorr-bench"):
            source = feature_source(pipeline.manifest, files.features, files.real)
        key = RunKey.of(pipeline, options, source.identity if source is not None else "")
        store = ResultStore.open(files.results, key)
        with progress_bar() as advance:
            shown = files.report is not None
            measured = bench(pipeline, chosen, options, advance, store=store, source=source, shown=shown)
        return measured, _page(pipeline, measured, source) if files.report is not None else ""


def _page(pipeline: Pipeline, measured: Bench, source: FeatureSource | None) -> str:
    from adacorr_deploy.quality.bench_options import sampler_of_runs
    from adacorr_deploy.quality.report import ReportFacts, report_html
    from adacorr_deploy.quality.report.machine import machine_facts

    real = source.real if source is not None else None
    facts = ReportFacts(
        model=pipeline.manifest.model_name,
        checkpoint=pipeline.manifest.checkpoint_sha256,
        sampler=sampler_of_runs(pipeline, measured.options).value.upper(),
        machine=machine_facts(backend=pipeline.backend.name, hardware=pipeline.backend.hardware),
        network=source.name if source is not None else "",
        real=real.name if real is not None else "",
        made=datetime.now(timezone.utc),
    )
    return report_html(measured, facts)


def _show_rows(rows: Sequence[Mapping[str, Cell]], files: Files) -> None:
    columns = [*_SHOWN, *(name for name in _SHOWN_OF_SETS if any(row[name] is not None for row in rows))]
    show_table(columns, [[row[name] for name in columns] for row in rows])
    show_lines(
        *(f"{row['policy']} could not be measured: {row['error']}" for row in rows if row["error"]),
        *([f"rows: {files.csv}"] if files.csv is not None else []),
        *([f"report: {files.report}"] if files.report is not None else []),
    )


def _write(files: Files, rows: Sequence[Mapping[str, Cell]], page: str) -> None:
    """Write the table and the report, both or neither."""
    from adacorr_deploy.cli.output_files import write_files

    contents: dict[Path, bytes] = {}
    if files.csv is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        contents[files.csv] = text.getvalue().encode()
    if files.report is not None:
        contents[files.report] = page.encode()
    write_files(contents)
