"""Each guard forces evaluation, with its reason, and none of them fires in the middle of a healthy run."""

from __future__ import annotations

import math

import pytest

from adacorr_deploy.caching.decisions import Signals, SlotHistory
from adacorr_deploy.caching.guards import Guards, doubtful

GUARDS = Guards(warmup_steps=3, final_steps=2, max_age_steps=4, protected_blocks=frozenset({5}))


def reason(*, step: int, evaluated: list[int], block: int = 0, guards: Guards = GUARDS) -> str | None:
    history = SlotHistory(capacity=3, steps=evaluated)
    return guards.reason(step=step, steps=20, age=history.age(step), parts=(block,))


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ("first use", {"step": 9, "evaluated": []}),
        ("warm-up", {"step": 2, "evaluated": [1, 0]}),
        ("final steps", {"step": 18, "evaluated": [17]}),
        ("maximum age", {"step": 10, "evaluated": [5]}),
        ("protected block", {"step": 10, "evaluated": [9], "block": 5}),
        (None, {"step": 10, "evaluated": [6]}),
    ],
)
def test_guard(expected: str | None, arguments: dict[str, object]) -> None:
    assert reason(**arguments) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["relative_offset", "spatial_change", "paper_temporal", "paper_spatial"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_signal_is_doubtful_in_any_branch(field: str, value: float) -> None:
    fine = Signals(
        relative_offset=0.1, relative_offset_p95=0.2, spatial_change=0.1, paper_temporal=1.0, paper_spatial=0.5
    )
    values = {
        name: getattr(fine, name)
        for name in ("relative_offset", "relative_offset_p95", "spatial_change", "paper_temporal", "paper_spatial")
    }
    broken = Signals(**{**values, field: value})
    assert doubtful([fine, broken])
    assert not doubtful([fine, fine])
    assert not doubtful(None)


def test_history_keeps_its_capacity_newest_first() -> None:
    history = SlotHistory(capacity=2)
    for step in (1, 4, 6):
        history.record(step)
    assert history.steps == [6, 4]
    assert history.age(9) == 3
