"""Charts show every number where its axis says it is, and names never cover one another."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.quality.bench import Bench
from adacorr_deploy.quality.bench_rows import BenchRow
from adacorr_deploy.quality.report.charts import GROWTH_FRAMES, MEASURES, PARETO_FRAMES, growth, pareto
from adacorr_deploy.quality.report.families import families
from adacorr_deploy.quality.report.labels import Box, place_labels, spread
from adacorr_deploy.quality.report.scales import scale_for

PLACES = st.floats(0, 300)
NUMBERS = st.floats(-1e6, 1e6)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_a_scale_holds_all_values_in_order_and_its_ticks_are_few_and_inside(values: list[float]) -> None:
    scale = scale_for(values, 10, 210)
    places = [scale(value) for value in sorted(values)]
    assert all(10 <= place <= 210 for place in places)
    assert places == sorted(places)
    ticks = scale.ticks(6)
    assert 1 <= len(ticks) <= 14
    air = 1e-6 * (scale.high - scale.low)
    assert all(scale.low - air <= tick <= scale.high + air for tick in ticks)


@given(st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=20))
def test_a_logarithmic_scale_holds_all_values_between_powers_of_ten(values: list[float]) -> None:
    scale = scale_for(values, 200, 0, logarithmic=True)
    assert all(0 <= scale(value) <= 200 for value in values)
    assert scale.low <= min(values) * 1.0001 and max(values) <= scale.high * 1.0001
    assert len(scale.ticks(5)) >= 2


@given(st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=12), st.integers(1, 20))
def test_names_stay_in_the_chart_and_cover_neither_points_nor_names(
    points: list[tuple[float, float]], letters: int
) -> None:
    area = Box(left=0, top=0, right=300, bottom=300)
    placed = place_labels(points, ["x" * letters] * len(points), area)
    boxes = []
    for label in placed:
        if label is not None:
            width = letters * 6.4
            left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
            boxes.append(Box(left=left, top=label.y - 10.9, right=left + width, bottom=label.y + 3))
    assert not any(one.meets(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.left >= -1 and box.right <= 301 for box in boxes)


@given(st.lists(st.floats(0, 500), max_size=12))
def test_names_at_the_side_are_moved_apart_in_their_order(places: list[float]) -> None:
    moved = spread(places, 15, 0, 500)
    order = sorted(range(len(places)), key=places.__getitem__)
    ordered = [moved[index] for index in order]
    assert all(later - earlier >= 15 - 1e-6 for earlier, later in itertools.pairwise(ordered))


@pytest.mark.parametrize("frame", PARETO_FRAMES, ids=lambda frame: frame.kind)
def test_better_is_always_further_up_and_faster_further_right(measured: Bench, frame: object) -> None:
    drawn = 0
    for measure in MEASURES:
        chart = pareto(measured.rows, measure, next(each for each in PARETO_FRAMES if each is frame))
        if chart is None:
            continue
        drawn += 1
        rows = {row.policy: row for row in measured.rows}
        for one, other in itertools.permutations(chart.points, 2):
            gain = measure.of_row(rows[one.policy]) - measure.of_row(rows[other.policy])
            if gain > 0:
                assert (one.y <= other.y) == measure.higher_is_better or one.y == other.y
            if rows[one.policy].speedup > rows[other.policy].speedup:
                assert one.x > other.x
        area = chart.frame.area
        assert all(area.left <= point.x <= area.right and area.top <= point.y <= area.bottom for point in chart.points)
    assert drawn >= 4  # SSIM has no value for images this small


def test_the_uncached_run_is_shown_as_exact_and_the_baseline_as_a_curve(measured: Bench) -> None:
    chart = pareto(measured.rows, MEASURES[0], PARETO_FRAMES[0])
    assert chart is not None
    assert "none" not in {point.policy for point in chart.points}
    assert chart.exact_x is not None
    fewer = [row for row in measured.rows if row.policy.startswith("fewer-steps")]
    assert len(chart.baseline.split()) == len(fewer) >= 2


def test_a_measure_of_fewer_than_two_rows_has_no_chart() -> None:
    row = BenchRow(policy="a", steps=1, speedup=2.0, psnr_db=40.0)
    assert pareto([row, replace(row, policy="b", psnr_db=math.nan)], MEASURES[0], PARETO_FRAMES[0]) is None
    assert growth([], GROWTH_FRAMES[0]) is None


def test_errors_are_drawn_for_runs_of_the_same_steps_alone(measured: Bench) -> None:
    chart = growth(list(measured.runs.values()), GROWTH_FRAMES[0])
    assert chart is not None
    drawn = {line.policy for line in chart.lines}
    assert {"fora", "fora@2"} <= drawn
    assert not any(policy.startswith("fewer-steps") or policy in ("none", "fora@5") for policy in drawn)


def test_families_share_a_style_and_differ_in_more_than_colour() -> None:
    names = [f"p{index}@{target}" for index in range(14) for target in (1, 2)]
    found = families(["none", *names])
    assert found["p3@1"] == found["p3@2"]
    assert len({(family.style, family.shape) for family in found.values()}) == 15


def test_what_adacorrection_is_on_top_of_keeps_its_mark_and_gets_a_ring() -> None:
    found = families(["teacache", "teacache+adacorrection@2", "robust@2"])
    base, on_top = found["teacache"], found["teacache+adacorrection@2"]
    assert (
        (base.style, base.shape) == (on_top.style, on_top.shape) != (found["robust@2"].style, found["robust@2"].shape)
    )
    assert (base.ringed, on_top.ringed) == (False, True)


def test_more_lines_than_have_room_for_names_are_drawn_with_the_first_ones_named(measured: Bench) -> None:
    run = measured.runs["fora"]
    many = [replace(run, policy=run.policy.model_copy(update={"name": f"p{index}"})) for index in range(60)]
    chart = growth(many, GROWTH_FRAMES[0])
    assert chart is not None and len(chart.lines) == 60
    named = [line.label_y for line in chart.lines if line.label_y is not None]
    assert 15 <= len(named) < 30
    assert [line.label_y is not None for line in chart.lines] == sorted(
        (line.label_y is not None for line in chart.lines), reverse=True
    )
    area = chart.frame.area
    assert all(area.top <= place <= area.bottom for place in named)
