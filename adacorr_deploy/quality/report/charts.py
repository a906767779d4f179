"""The two charts of the report as plain geometry: quality against speed, and how the error grows over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.quality.bench_rows import BenchRow, PolicyRun
from adacorr_deploy.quality.metrics import BootstrapInterval
from adacorr_deploy.quality.report.families import family_name
from adacorr_deploy.quality.report.labels import LETTER, Box, Label, place_labels, spread
from adacorr_deploy.quality.report.scales import Scale, scale_for

_LONGEST_NAME: Final = 24  # letters
_LINE_HEIGHT: Final = 15.0  # of names one below the other


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Size of a chart and of the margins around its axes, in pixels; there is one for wide screens, one for narrow."""

    kind: str
    width: float
    height: float
    left: float
    right: float
    top: float = 16
    bottom: float = 46

    @property
    def area(self) -> Box:
        return Box(left=self.left, top=self.top, right=self.width - self.right, bottom=self.height - self.bottom)


PARETO_FRAMES: Final = (
    Frame(kind="wide", width=960, height=500, left=62, right=20),
    Frame(kind="narrow", width=340, height=360, left=46, right=8),
)
GROWTH_FRAMES: Final = (
    Frame(kind="wide", width=960, height=400, left=62, right=190),
    Frame(kind="narrow", width=340, height=320, left=52, right=8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    x_title: str
    y_title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One policy on the Pareto chart; `low` and `high` are the ends of its interval, or None."""

    policy: str
    x: float
    y: float
    low: float | None
    high: float | None
    label: Label | None
    name: str  # as the label shows it
    text: str  # what a person who points at it reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    frame: Frame
    axes: Axes
    points: Sequence[Point]
    baseline: str  # SVG points of the curve of fewer steps; empty without two of them
    families: Sequence[tuple[str, str]]  # of several targets: one of their policies, and SVG points through all
    exact_x: float | None  # where the uncached run lies beyond the chart's upper end
    exact_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One way to tell quality: where it stands in a row, and which way is up."""

    key: str
    title: str
    axis: str
    of_row: Callable[[BenchRow], float]
    interval: Callable[[BenchRow], BootstrapInterval | None] = lambda row: None
    higher_is_better: bool = True
    digits: int = 1


def _frechet(row: BenchRow) -> BootstrapInterval | None:
    return row.sets.frechet if row.sets is not None else None


def _frechet_uncached(row: BenchRow) -> BootstrapInterval | None:
    return row.sets.frechet_uncached if row.sets is not None else None


def _value(of_row: Callable[[BenchRow], BootstrapInterval | None]) -> Callable[[BenchRow], float]:
    def value(row: BenchRow) -> float:
        found = of_row(row)
        return math.nan if found is None else found.value

    return value


MEASURES: Final = (
    Measure(key="psnr", title="PSNR", axis="PSNR against the uncached images, dB", of_row=lambda row: row.psnr_db),
    Measure(key="ssim", title="SSIM", axis="SSIM against the uncached images", of_row=lambda row: row.ssim, digits=4),
    Measure(
        key="feature",
        title="Feature distance",
        axis="feature distance to the uncached images",
        of_row=lambda row: row.feature_distance,
        higher_is_better=False,
        digits=5,
    ),
    Measure(
        key="frechet",
        title="Fréchet, to real images",
        axis="Fréchet distance to real images",
        of_row=_value(_frechet),
        interval=_frechet,
        higher_is_better=False,
        digits=3,
    ),
    Measure(
        key="frechet-uncached",
        title="Fréchet, to the uncached",
        axis="Fréchet distance to the uncached samples",
        of_row=_value(_frechet_uncached),
        interval=_frechet_uncached,
        higher_is_better=False,
        digits=3,
    ),
)


def pareto(rows: Sequence[BenchRow], measure: Measure, frame: Frame) -> Pareto | None:
    """Return quality against speed, better always further up; None if fewer than two rows have this measure.

    Args:
        rows: Those to be named first stand first: where names would meet, later ones are left out.
        measure: What the quality is.
        frame: Where it is drawn.
    """
    placed = [row for row in rows if math.isfinite(row.speedup) and math.isfinite(measure.of_row(row))]
    if len(placed) < 2:
        return None
    area = frame.area
    exact = next((row for row in rows if measure.of_row(row) == math.inf and math.isfinite(row.speedup)), None)
    ends = [end for row in placed if (found := measure.interval(row)) for end in (found.low, found.high)]
    up, down = (area.top, area.bottom) if measure.higher_is_better else (area.bottom, area.top)
    x = scale_for([row.speedup for row in (*placed, *([exact] if exact else []))], area.left, area.right, margin=0.05)
    y = scale_for([*map(measure.of_row, placed), *ends], down, up)
    places = [(x(row.speedup), y(measure.of_row(row))) for row in placed]
    named = [
        "" if is_fewer_steps(row.policy) else shown_name(row.policy) for row in placed
    ]  # the curve has a name of its own
    exact_text = "uncached: exact" if frame.kind == "wide" else "exact"
    covered = [] if exact is None else [_box_of_exact(x(exact.speedup), area, exact_text)]
    labels = place_labels(places, named, area, covered=covered)
    points = [_point(row, measure, place, label, y) for row, place, label in zip(placed, places, labels, strict=True)]
    curve = sorted((row.speedup, measure.of_row(row)) for row in placed if is_fewer_steps(row.policy))
    return Pareto(
        frame=frame,
        axes=_axes(x, y, frame, "speed-up in wall-clock time", measure.axis),
        points=points,
        baseline=_polyline([(x(speed), y(quality)) for speed, quality in curve]) if len(curve) > 1 else "",
        families=_family_lines(placed, places),
        exact_x=x(exact.speedup) if exact is not None else None,
        exact_text=exact_text,
    )


def shown_name(policy: str) -> str:
    """Return a policy's name as it fits on a chart."""
    return policy if len(policy) <= _LONGEST_NAME else f"{policy[: _LONGEST_NAME - 1]}…"


def is_fewer_steps(policy: str) -> bool:
    """Say whether a row is the baseline that every cache is compared with."""
    return policy.partition("@")[0] == "fewer-steps"


def _box_of_exact(at: float, area: Box, text: str) -> Box:
    return Box(left=at - 6, top=area.top - 4, right=at + 12 + len(text) * LETTER, bottom=area.top + 14)


def _family_lines(rows: Sequence[BenchRow], places: Sequence[tuple[float, float]]) -> list[tuple[str, str]]:
    members: dict[str, list[tuple[tuple[float, float], str]]] = {}
    for row, place in zip(rows, places, strict=True):
        if not is_fewer_steps(row.policy):
            members.setdefault(family_name(row.policy), []).append((place, row.policy))
    return [
        (found[0][1], _polyline([place for place, _ in sorted(found)])) for found in members.values() if len(found) > 1
    ]


def _point(row: BenchRow, measure: Measure, place: tuple[float, float], label: Label | None, y: Scale) -> Point:
    interval = measure.interval(row)
    text = f"{row.policy}: {row.speedup:.2f}×, {measure.title} {measure.of_row(row):.{measure.digits}f}"
    if interval is not None:
        text += f" ({interval.low:.{measure.digits}f} … {interval.high:.{measure.digits}f})"
    if math.isfinite(row.rho):
        text += f", {row.rho:.0%} of block launches skipped"
    return Point(
        policy=row.policy,
        x=place[0],
        y=place[1],
        low=y(interval.low) if interval is not None else None,
        high=y(interval.high) if interval is not None else None,
        label=label,
        name=shown_name(row.policy),
        text=text,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One policy's error over the steps; `label_y` is where its name stands at the right, None if there is no room."""

    policy: str
    points: str
    end_y: float
    label_y: float | None
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    frame: Frame
    axes: Axes
    lines: Sequence[Line]


def growth(runs: Sequence[PolicyRun], frame: Frame) -> Growth | None:
    """Return how the latents' relative error grows, on a logarithmic axis; None if no policy has an error.

    Steps before a policy's first error are left out: a logarithm has no place for 0. Where there are more lines than
    names fit beside, the first ones get theirs.
    """
    errors = {
        run.policy.name: [(step + 1, float(error)) for step, error in enumerate(run.sampled.growth) if error > 0]
        for run in runs
        if run.sampled is not None and run.sampled.growth is not None
    }
    drawn = {name: pairs for name, pairs in errors.items() if len(pairs) > 1}
    if not drawn:
        return None
    area = frame.area
    last = max(step for pairs in drawn.values() for step, _ in pairs)
    x = Scale(low=1, high=max(last, 2), start=area.left, stop=area.right)
    y = scale_for([error for pairs in drawn.values() for _, error in pairs], area.bottom, area.top, logarithmic=True)
    ends = [y(pairs[-1][1]) for pairs in drawn.values()]
    room = int((area.bottom - area.top) / _LINE_HEIGHT)
    beside = spread(ends[:room], _LINE_HEIGHT, area.top + 4, area.bottom) + [None] * (len(ends) - room)
    lines = [
        Line(
            policy=name,
            points=_polyline([(x(step), y(error)) for step, error in pairs]),
            end_y=end,
            label_y=label,
            name=shown_name(name),
            text=f"{name}: {pairs[-1][1]:.2g} after the last step",
        )
        for (name, pairs), end, label in zip(drawn.items(), ends, beside, strict=True)
    ]
    return Growth(frame=frame, axes=_axes(x, y, frame, "step", "relative error of the latents"), lines=lines)


def _axes(x: Scale, y: Scale, frame: Frame, x_title: str, y_title: str) -> Axes:
    few = frame.kind == "narrow"
    return Axes(
        x_ticks=[Tick(at=x(value), text=_number(value)) for value in x.ticks(5 if few else 10)],
        y_ticks=[Tick(at=y(value), text=_number(value)) for value in y.ticks(5 if few else 7)],
        x_title=x_title,
        y_title=y_title,
    )


def _number(value: float) -> str:
    """Return a tick's text: short, and never a power that has to be counted."""
    return f"{value:.0e}".replace("e-0", "e−").replace("e-", "e−") if 0 < value < 1e-4 else f"{value:.6g}"


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
