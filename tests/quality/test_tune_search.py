"""The search finds the border of its target, whichever way a knob turns, and the front holds what nothing beats."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.quality.tune_search import Knob, Target, pareto_front, search, survivors


@dataclass(frozen=True)
class Measured:
    speedup: float
    psnr_db: float
    value: float = 0.0


def saved(value: float) -> Measured:
    """The larger the value, the faster and the worse."""
    return Measured(1 + value, 60 - 20 * math.log2(1 + value), value)


@given(start=st.floats(0.02, 20), speedup=st.floats(1.2, 8))
def test_a_target_speed_is_met_by_little_more_than_it_asks(start: float, speedup: float) -> None:
    target = Target(speedup=speedup)
    best = target.best(search(Knob(start=start), saved, target))
    assert best is not None
    if 1 + start / 1.6**8 < speedup < 1 + start * 1.6**8:  # within the search's reach
        assert speedup <= best.speedup < 1 + (speedup - 1) * 1.6


@given(start=st.floats(0.1, 10), psnr_db=st.floats(20, 50))
def test_a_target_quality_is_kept_with_little_speed_left(start: float, psnr_db: float) -> None:
    target = Target(psnr_db=psnr_db)
    best = target.best(search(Knob(start=start), saved, target))
    assert best is not None
    if saved(start * 1.6**8).psnr_db < psnr_db < saved(start / 1.6**8).psnr_db:
        assert best.psnr_db >= psnr_db
        assert saved(best.value * 1.6).psnr_db < psnr_db


def test_a_knob_that_saves_less_the_larger_it_is_is_turned_the_other_way() -> None:
    target = Target(speedup=3.0)
    best = target.best(search(Knob(start=1.0), lambda value: saved(1 / value), target))
    assert best is not None
    assert 3.0 <= best.speedup < 3.5


@pytest.mark.parametrize("speedup", [1.5, 2.0, 2.5, 3.7, 5.0, 9.0])
def test_a_whole_knob_is_tried_at_whole_numbers_only_and_finds_the_least_that_meets_the_target(speedup: float) -> None:
    tried: list[float] = []

    def measure(value: float) -> Measured:
        tried.append(value)
        return saved(value - 1)

    target = Target(speedup=speedup)
    best = target.best(search(Knob(start=3, whole=True), measure, target))
    assert best is not None
    assert best.speedup == math.ceil(speedup)
    assert all(value == round(value) for value in tried)
    assert len(tried) == len(set(tried))


def test_a_value_that_the_policy_refuses_ends_the_search_there() -> None:
    target = Target(speedup=10.0)
    found = search(Knob(start=1.0), lambda value: saved(value) if value <= 2 else None, target)
    assert max(point.value for point in found) <= 2
    assert target.best(found) == max(found, key=lambda point: point.speedup)
    assert search(Knob(start=1.0), lambda value: None, target) == []


def test_a_policy_that_always_does_the_same_is_measured_a_few_times_and_given_up() -> None:
    same = Measured(1.0, math.inf)
    found = search(Knob(start=1.0), lambda value: same, Target(speedup=2.0))
    assert 1 <= len(found) <= 20
    assert Target(speedup=2.0).best(found) == same


points = st.lists(st.tuples(st.floats(1, 10), st.floats(10, 60)), max_size=12)


@given(points)
def test_the_front_holds_exactly_what_nothing_beats(values: list[tuple[float, float]]) -> None:
    measured = [Measured(speedup, psnr) for speedup, psnr in values]
    front = pareto_front(measured)
    for point in measured:
        beaten = any(
            other.speedup >= point.speedup and other.psnr_db >= point.psnr_db and other != point for other in measured
        )
        assert (point in front) == (not beaten)
    assert all(one.speedup < other.speedup for one, other in itertools.pairwise(front))


def test_families_that_meet_the_target_go_on_before_those_that_do_not_and_the_better_first() -> None:
    best = [("a", Measured(2.1, 30)), ("b", Measured(1.9, 50)), ("c", Measured(2.0, 40)), ("d", Measured(1.2, 60))]
    assert survivors(best, Target(speedup=2.0), 3) == ["c", "a", "b"]
    assert survivors(best, Target(psnr_db=45), 2) == ["b", "d"]
