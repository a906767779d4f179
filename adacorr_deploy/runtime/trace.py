"""The trace: what each block did at each step, and why."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum

from adacorr_deploy.caching.decisions import Action, Decision


class Branch(str, Enum):
    """A guidance branch; the order is that of the rows."""

    COND = "cond"
    UNCOND = "uncond"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    """What one block did for one branch at one step."""

    step: int
    block: str
    branch: Branch
    action: Action
    reason: str
    score: float | None  # what the policy compared; None where it computes none
    weight: float | None  # share of the fresh output: 0 reuse … 1 recompute; None where it computes none
    age: int | None  # steps since the slot was filled, when the decision was taken; None before the first evaluation


@dataclass(slots=True)
class Trace:
    """The decisions of one request. Guidance branches decide together, so each decision stands for all of them."""

    steps: int
    blocks: tuple[str, ...]
    branches: tuple[Branch, ...]
    _entries: list[tuple[int, int, Decision, int | None]] = field(default_factory=list, repr=False)
    _reused: int = 0

    def record(self, step: int, block: int, decision: Decision, age: int | None) -> None:
        self._entries.append((step, block, decision, age))
        self._reused += decision.action is Action.REUSE

    @property
    def launches(self) -> int:
        """Block launches that the decisions so far ask for; the engines' own counters must say the same."""
        return len(self._entries) - self._reused

    @property
    def reuses(self) -> int:
        """Block launches that the decisions so far skipped."""
        return self._reused

    def steps_decided_by(self, reasons: Collection[str]) -> int:
        """Return at how many steps a decision was taken for one of these reasons."""
        return len({step for step, _, decision, _ in self._entries if decision.reason in reasons})

    @property
    def rho(self) -> float:
        """Share of block launches skipped so far, 0 … 1."""
        return self._reused / len(self._entries) if self._entries else 0.0

    @property
    def records(self) -> Iterator[TraceRecord]:
        for step, block, decision, age in self._entries:
            for branch in self.branches:
                yield TraceRecord(
                    step=step,
                    block=self.blocks[block],
                    branch=branch,
                    action=decision.action,
                    reason=decision.reason,
                    score=decision.score,
                    weight=decision.weight,
                    age=age,
                )

    def to_json(self) -> str:
        """Return `{"steps": …, "blocks": […], "records": […]}`; a score that is not finite is written as null."""
        records = [_json_record(record) for record in self.records]
        return json.dumps({"steps": self.steps, "blocks": list(self.blocks), "records": records}, allow_nan=False)


def _json_record(record: TraceRecord) -> dict[str, str | int | float | None]:
    return {
        "step": record.step,
        "block": record.block,
        "branch": record.branch.value,
        "action": record.action.value,
        "reason": record.reason,
        "score": _finite(record.score),
        "weight": _finite(record.weight),
        "age": record.age,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
