"""The page itself: what the templates are given, and the one HTML file that comes out."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from adacorr_deploy.quality.bench import Bench
from adacorr_deploy.quality.bench_rows import BenchRow, PolicyRun, best_by_speed
from adacorr_deploy.quality.bench_sampling import Sampled
from adacorr_deploy.quality.metrics import BootstrapInterval
from adacorr_deploy.quality.report.charts import (
    GROWTH_FRAMES,
    MEASURES,
    PARETO_FRAMES,
    Growth,
    Measure,
    Pareto,
    growth,
    is_fewer_steps,
    pareto,
)
from adacorr_deploy.quality.report.decision_map import DecisionMap, decision_map
from adacorr_deploy.quality.report.families import Family, families
from adacorr_deploy.quality.report.sprites import Comparison, Sprite, comparison, sprite

_FOLDER: Final = "templates"
_WORTH_A_HEADLINE: Final = 1.3  # speed-up


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFacts:
    """What the page says of the run beside its numbers.

    Attributes:
        model: The bundle's name for the model.
        checkpoint: SHA-256 of the checkpoint.
        sampler: Of all runs.
        machine: What it ran on, one fact a line: name → value.
        network: The network whose features were compared, or empty.
        real: The real images that samples were compared with, or empty.
        made: When the page was made.
    """

    model: str
    checkpoint: str
    sampler: str
    machine: Mapping[str, str]
    network: str
    real: str
    made: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number of the table: its text, what it is sorted by, and a smaller second line."""

    text: str
    order: float
    below: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Everything that the page shows of one policy."""

    anchor: str
    row: BenchRow
    family: Family
    cells: Sequence[Cell]
    on_front: bool
    is_baseline: bool
    summary: str
    step_times: str
    map: DecisionMap | None
    images: Comparison | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A measure's chart for each screen width."""

    measure: Measure
    drawings: Sequence[Pareto]


def report_html(bench: Bench, facts: ReportFacts) -> str:
    """Return the report as one HTML document that loads nothing.

    Args:
        bench: What was measured; policies that failed are shown with their reason.
        facts: What the page says of the run.
    """
    environment = Environment(
        loader=PackageLoader("adacorr_deploy.quality.report", _FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["script_json"] = _script_json
    script = _source("report.js")
    return environment.get_template("report.html.j2").render(
        **_context(bench, facts),
        style=Markup(_source("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _context(bench: Bench, facts: ReportFacts) -> dict[str, object]:
    rows = _most_telling_first(bench.rows)
    styles = families([row.policy for row in bench.rows])
    front = {row.policy for row in best_by_speed(bench.rows)}
    columns = [column for column in _COLUMNS if any(math.isfinite(column.of_row(row)) for row in bench.rows)]
    uncached = bench.runs["none"].sampled
    panels = [
        _panel(index, row, bench.runs[row.policy], bench, styles[row.policy], columns, row.policy in front)
        for index, row in enumerate(bench.rows)
    ]
    charts = [
        Chart(measure=measure, drawings=[drawn for frame in PARETO_FRAMES if (drawn := pareto(rows, measure, frame))])
        for measure in MEASURES
    ]
    return {
        "facts": facts,
        "options": bench.options,
        "panels": panels,
        "columns": columns,
        "charts": [chart for chart in charts if chart.drawings],
        "growths": _growths(bench),
        "anchors": {panel.row.policy: panel.anchor for panel in panels},
        "styles": styles,
        "legend": {family.name: family for family in styles.values() if family.name != "none"},
        "has_rings": any(family.ringed for family in styles.values()),
        "headline": _headline(rows),
        "uncached": _uncached_sprite(bench),
        "shown_images": 0 if uncached is None or uncached.pictures is None else len(uncached.pictures),
        "has_sets": any(row.sets is not None for row in bench.rows),
        "failed": bench.failed,
    }


def _growths(bench: Bench) -> list[Growth]:
    runs = [bench.runs[row.policy] for row in _most_telling_first(bench.rows) if row.policy != "none"]
    return [drawn for frame in GROWTH_FRAMES if (drawn := growth(runs, frame)) is not None]


def _uncached_sprite(bench: Bench) -> Sprite | None:
    uncached = bench.runs["none"].sampled
    return None if uncached is None or uncached.pictures is None else sprite(uncached.pictures)


def _most_telling_first(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Return the rows so that those of the front get their names on a crowded chart, and the baselines last."""
    front = {row.policy for row in best_by_speed(rows)}
    return sorted(rows, key=lambda row: (is_fewer_steps(row.policy), row.policy not in front))


def _headline(rows: Sequence[BenchRow]) -> BenchRow | None:
    """Return the policy that is furthest above fewer steps, of those on the front that save something worth saying."""
    worth = [row for row in best_by_speed(rows) if row.speedup >= _WORTH_A_HEADLINE and math.isfinite(row.gain_db)]
    return max(worth, key=lambda row: row.gain_db, default=None)


def _panel(
    index: int,
    row: BenchRow,
    run: PolicyRun,
    bench: Bench,
    family: Family,
    columns: Sequence[Column],
    on_front: bool,
) -> Panel:
    uncached = bench.runs["none"].sampled
    own = run.sampled if not row.error else None
    return Panel(
        anchor=f"policy-{index}",
        row=row,
        family=family,
        cells=[column.cell(row) for column in columns],
        on_front=on_front,
        is_baseline=family.style == "base",
        summary=_summary(row),
        step_times=_step_times(own) if own is not None else "",
        map=decision_map(own.trajectory.decisions) if own is not None else None,
        images=_images(own, uncached),
    )


def _images(own: Sampled | None, uncached: Sampled | None) -> Comparison | None:
    if own is None or uncached is None or own.pictures is None or uncached.pictures is None:
        return None
    return comparison(own.pictures, uncached.pictures)


def _summary(row: BenchRow) -> str:
    if row.error:
        return f"could not be measured: {row.error}"
    quality = "the same images as the uncached run" if row.psnr_db == math.inf else f"PSNR {row.psnr_db:.1f} dB"
    parts = [f"{row.speedup:.2f}× as fast", quality, f"{row.rho:.0%} of block launches skipped"]
    if math.isfinite(row.gain_db):
        parts.append(f"{row.gain_db:+.1f} dB against {row.baseline}, chosen to take as long")
    return ", ".join(parts)


def _step_times(sampled: Sampled) -> str:
    """Return what a step took by what its blocks did, of the recorded request; empty where all did the same."""
    evaluated = (sampled.trajectory.decisions.actions != "reuse").mean(axis=1)
    milliseconds = 1000 * sampled.trajectory.seconds
    kinds = (
        ("all blocks launched", evaluated == 1),
        ("some", (evaluated > 0) & (evaluated < 1)),
        ("none", evaluated == 0),
    )
    parts = [f"{name} {np.median(milliseconds[chosen]):.1f} ms" for name, chosen in kinds if chosen.any()]
    return f"Median time of a step: {', '.join(parts)}" if len(parts) > 1 else ""


# --- The table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table."""

    title: str
    meaning: str
    name: str  # of the row's field, or of its sets'
    form: str = ".2f"
    unit: str = ""
    share: float = 1.0  # what the number is multiplied with before it is shown

    def of_row(self, row: BenchRow) -> float:
        """Return the number, NaN where there is none."""
        interval = self._interval(row)
        if interval is not None:
            return interval.value
        number: float = getattr(row, self.name, math.nan)
        return number

    def cell(self, row: BenchRow) -> Cell:
        number, interval = self.of_row(row), self._interval(row)
        if math.isnan(number):
            return Cell(text="–", order=-math.inf)
        if math.isinf(number):
            return Cell(text="exact" if number > 0 else "–", order=number)
        below = f"{interval.low:{self.form}} … {interval.high:{self.form}}" if interval is not None else ""
        text = f"{number * self.share:{self.form}}{self.unit}".replace("-", "−")
        return Cell(text=text, order=number, below=below)

    def _interval(self, row: BenchRow) -> BootstrapInterval | None:
        found: BootstrapInterval | None = getattr(row.sets, self.name, None)
        return found


_COLUMNS: Final = (
    Column(title="speed-up", meaning="uncached time ÷ time, median of paired rounds", name="speedup", unit="×"),
    Column(title="PSNR, dB", meaning="against the uncached images, mean", name="psnr_db", form=".1f"),
    Column(title="vs fewer steps", meaning="PSNR above fewer steps that take as long, dB", name="gain_db",
           form="+.1f"),
    Column(title="seconds", meaning="median time for all images", name="seconds"),
    Column(title="ρ", meaning="share of block launches skipped", name="rho"),
    Column(title="efficiency", meaning="speed-up ÷ what removing ρ of the block time would give", name="efficiency"),
    Column(title="FLOPs saved", meaning="share of the operations not done", name="flops_saved", form=".0f", unit=" %",
           share=100),
    Column(title="worst", meaning="lowest PSNR of an image, dB", name="psnr_worst_db", form=".1f"),
    Column(title="SSIM", meaning="against the uncached images, mean", name="ssim", form=".4f"),
    Column(title="features", meaning="feature distance to the uncached images, mean", name="feature_distance",
           form=".2g"),
    Column(title="Fréchet", meaning="distance to real images, 95 % interval", name="frechet"),
    Column(title="÷ uncached", meaning="Fréchet distance ÷ the uncached samples', 95 % interval", name="frechet_ratio",
           form=".3f"),
    Column(title="to uncached", meaning="Fréchet distance to the uncached samples, 95 % interval",
           name="frechet_uncached", form=".3f"),
    Column(title="precision", meaning="of the samples, inside the uncached manifold", name="precision", form=".3f"),
    Column(title="recall", meaning="of the uncached samples, inside the samples' manifold", name="recall", form=".3f"),
    Column(title="precision, real", meaning="of the samples, inside the real manifold", name="precision_real",
           form=".3f"),
    Column(title="recall, real", meaning="of the real images, inside the samples' manifold", name="recall_real",
           form=".3f"),
)  # fmt: skip


def _script_json(text: str) -> Markup:
    """Return JSON that can stand inside a script element: nothing in it ends the element or begins a comment."""
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(safe)


def _source(name: str) -> str:
    return (files("adacorr_deploy.quality.report") / _FOLDER / name).read_text(encoding="utf-8")
