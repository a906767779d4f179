"""What the kernels of decisions.cu read and write: a rule per block, and a trace. Numbers only, nothing of CUDA.

Both are 64-bit integers; their floating-point numbers are doubles by their bits, so that a GPU decides with the very
numbers that the host would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.block_rules import BlockRule

DECIDE_KERNEL: Final = "adacorr_decide"
NOTE_KERNEL: Final = "adacorr_note_evaluation"
THREADS: Final = 32  # of either kernel: one block of one warp
NEVER: Final = -1  # in the place of the step of a slot's last evaluation, before the first

# The cases of a block's switch, and the actions in the trace, by their numbers. A graph that sets nothing evaluates.
CASES: Final = ("evaluate", "reuse", "correct")
REASONS: Final = (
    "first use",
    "warm-up",
    "final steps",
    "maximum age",
    "protected block",
    "signals not finite",
    "weight within epsilon",
    "weight above epsilon",
    "paper: always evaluated",
)
RULE_COLUMNS: Final = (
    "lambda",
    "gamma",
    "epsilon",
    "floor",
    "lazy",
    "warmup_steps",
    "final_steps",
    "max_age_steps",
    "is_protected",
)
RECORD_COLUMNS: Final = ("action", "reason", "age", "score", "weight")


def rule_row(rule: BlockRule) -> NDArray[np.int64]:
    """Return a rule as decisions.cu reads it, (9,)."""
    floats = np.array([rule.lambda_, rule.gamma, rule.epsilon, rule.floor], dtype=np.float64)
    integers = (rule.lazy, rule.warmup_steps, rule.final_steps, rule.max_age_steps, rule.protected)
    return np.concatenate([floats.view(np.int64), np.array(integers, dtype=np.int64)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One decision, as the trace keeps it."""

    action: int  # index into CASES
    reason: int  # index into REASONS
    age: int  # steps since the slot was filled; NEVER before the first evaluation
    score: float | None
    weight: float | None

    @property
    def record(self) -> NDArray[np.int64]:
        """The row of the trace, (5,)."""
        floats = [np.nan if value is None else value for value in (self.score, self.weight)]
        return np.concatenate(
            [np.array([self.action, self.reason, self.age], np.int64), np.array(floats, np.float64).view(np.int64)]
        )

    @classmethod
    def of(cls, record: NDArray[np.int64]) -> Verdict:
        """Return the decision that a row of the trace, (5,), stands for."""
        score, weight = (None if np.isnan(value) else float(value) for value in record[3:].view(np.float64))
        return cls(action=int(record[0]), reason=int(record[1]), age=int(record[2]), score=score, weight=weight)
