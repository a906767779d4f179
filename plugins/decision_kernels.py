"""What the kernels of decisions.cu read and write: a rule per block, and a trace. Numbers only, nothing of CUDA.

Both are 64-bit integers; their floating-point numbers are doubles by their bits, so that a GPU decides with the very
numbers that the host would.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

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
RECORD_COLUMNS: Final = ("action", "reason", "age", "score", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRule:
    """How one block is decided by the paper's score: `caching.policy.PaperGate` and `caching.guards.Guards` as numbers.

    Attributes:
        lambda_: λ of S = Δ_temp² + λ·Δ_spatial.
        gamma: γ of w = clip(γ·(S − floor), 0, 1).
        epsilon: A lazy block is reused where w is at most this.
        floor: What is subtracted from S.
        lazy: Whether a block may be reused at all; without it, it is evaluated and blended at every step.
        warmup_steps: First steps of a run that are evaluated.
        final_steps: Last steps of a run that are evaluated.
        max_age_steps: Steps after an evaluation in which it may stand for the block.
        protected: Whether the block is evaluated at every step.
    """

    lambda_: float
    gamma: float
    epsilon: float
    floor: float
    lazy: bool
    warmup_steps: int
    final_steps: int
    max_age_steps: int
    protected: bool

    @property
    def row(self) -> NDArray[np.int64]:
        """The rule as decisions.cu reads it, (9,)."""
        floats = np.array([self.lambda_, self.gamma, self.epsilon, self.floor], dtype=np.float64)
        integers = (self.lazy, self.warmup_steps, self.final_steps, self.max_age_steps, self.protected)
        return np.concatenate([floats.view(np.int64), np.array(integers, dtype=np.int64)])

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """τ_reuse, τ_recompute and γ of the blend that a correction ends with."""
        return self.floor, self.floor + 1.0, self.gamma


RULE_COLUMNS: Final = 9


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
