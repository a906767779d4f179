"""Figures made of times of one round: every round times every arm once, so a drift of the machine touches all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Times = dict[str, float]  # seconds by arm, of one round


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure made of the times of one round.

    Attributes:
        median: Over the rounds.
        low: The lowest of them.
        high: The highest of them.
        of_fastest: The figure of each arm's fastest time.
        goal: What `median` is held to, and whether it reaches it; None where nothing was asked.
    """

    name: str
    median: float
    low: float
    high: float
    of_fastest: float
    goal: str | None
    met: bool | None


def figure(name: str, compute: Callable[[Times], float], rounds: Sequence[Times], goal: str | None = None) -> Figure:
    """Return a figure; `goal` is `<=` or `>=` and a number."""
    values = [compute(times) for times in rounds]
    median = statistics.median(values)
    met = None
    if goal is not None:
        sign, _, limit = goal.partition(" ")
        met = median <= float(limit) if sign == "<=" else median >= float(limit)
    return Figure(
        name=name,
        median=median,
        low=min(values),
        high=max(values),
        of_fastest=compute(fastest_times(rounds)),
        goal=goal,
        met=met,
    )


def median_times(rounds: Sequence[Times]) -> Times:
    return {arm: statistics.median(times[arm] for times in rounds) for arm in rounds[0]}


def fastest_times(rounds: Sequence[Times]) -> Times:
    return {arm: min(times[arm] for times in rounds) for arm in rounds[0]}


def print_figures(figures: Sequence[Figure]) -> None:
    print(f"{'figures':<50}{'median':>9}{'low':>9}{'high':>9}{'fastest':>9}  goal")
    for each in figures:
        numbers = "".join(f"{value:>9.4f}" for value in (each.median, each.low, each.high, each.of_fastest))
        verdict = "" if each.goal is None else f"  {each.goal}  {'met' if each.met else 'NOT met'}"
        print(f"{each.name:<50}{numbers}{verdict}")
