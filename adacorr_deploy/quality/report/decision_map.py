"""A policy's decisions and scores as maps of steps × blocks: few SVG paths, and the numbers behind them as JSON."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.quality.bench_sampling import Decisions

LEVELS: Final = 6  # shades of a score
_HEIGHT: Final = 10.0  # of a row, in the picture's own units; a step is as wide as the page makes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """All cells of one kind, as one path."""

    kind: str  # an action, or level-0 … level-5 of the scores
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionMap:
    """Both maps of one policy.

    Attributes:
        steps: Columns.
        blocks: Rows, first block above.
        decisions: Every action's cells.
        scores: Every level's cells; empty where the policy computes no score.
        score_range: Least and largest score, or None.
        shares: Share of each action that occurs.
        data: JSON for the reader's cursor: actions, reasons and scores, cell by cell.
    """

    steps: int
    blocks: int
    decisions: Sequence[Cells]
    scores: Sequence[Cells]
    score_range: tuple[float, float] | None
    shares: Sequence[tuple[str, float]]
    data: str

    @property
    def view_box(self) -> str:
        return f"0 0 {self.steps} {self.blocks * _HEIGHT:g}"


def decision_map(decisions: Decisions) -> DecisionMap:
    """Return the maps of one request's decisions."""
    actions, scores = decisions.actions, decisions.scores
    steps, blocks = actions.shape
    finite = scores[np.isfinite(scores)]
    bounds = (float(finite.min()), float(finite.max())) if finite.size else None
    kinds = sorted({str(action) for action in actions.flat})
    return DecisionMap(
        steps=steps,
        blocks=blocks,
        decisions=[Cells(kind=kind, path=_path(actions == kind)) for kind in kinds],
        scores=_score_cells(scores, bounds) if bounds is not None else [],
        score_range=bounds,
        shares=[(kind, float((actions == kind).mean())) for kind in kinds],
        data=_data(decisions),
    )


def _score_cells(scores: NDArray[np.float64], bounds: tuple[float, float]) -> list[Cells]:
    """Return the cells of each shade: scores span decades, so the shades are even in their logarithm where they can."""
    low, high = bounds
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.log(scores / low) / math.log(high / low) if 0 < low < high else (scores - low) / (high - low or 1)
    levels = np.where(np.isfinite(spread), np.clip(spread * LEVELS, 0, LEVELS - 1), -1).astype(np.int64)
    return [Cells(kind=f"level-{level}", path=_path(levels == level)) for level in range(LEVELS)]


def _path(mask: NDArray[np.bool_]) -> str:
    """Return rectangles over the runs of cells that are set, row by row: (S, L) → an SVG path."""
    return "".join(
        f"M{start} {block * _HEIGHT:g}h{stop - start}v{_HEIGHT:g}h{start - stop}z" for block, start, stop in _runs(mask)
    )


def _runs(mask: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
    for block, row in enumerate(mask.T.tolist()):
        for is_set, run in itertools.groupby(range(len(row)), key=row.__getitem__):
            if is_set:
                members = list(run)
                yield block, members[0], members[-1] + 1


def _data(decisions: Decisions) -> str:
    actions, action = np.unique(decisions.actions.T, return_inverse=True)
    reasons, reason = np.unique(decisions.reasons.T, return_inverse=True)
    table = decisions.actions.T.shape
    return json.dumps(
        {
            "actions": actions.tolist(),
            "action": action.reshape(table).tolist(),
            "reasons": reasons.tolist(),
            "reason": reason.reshape(table).tolist(),
            "scores": [[_short(score) for score in row] for row in decisions.scores.T.tolist()],
        },
        separators=(",", ":"),
        allow_nan=False,
    )


def _short(score: float) -> float | None:
    return float(f"{score:.4g}") if math.isfinite(score) else None
