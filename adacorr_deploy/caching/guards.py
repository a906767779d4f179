"""Guards: conditions under which a block is evaluated whatever a gate says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from adacorr_deploy.caching.decisions import Signals, SlotHistory


class Guards(BaseModel):
    """Evaluate on first use, in the first and last steps, past a maximum age, and in protected blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_steps: Annotated[int, Field(ge=0, le=1000)] = 2
    final_steps: Annotated[int, Field(ge=0, le=1000)] = 1
    max_age_steps: Annotated[int, Field(ge=1, le=1000)] = 6
    protected_blocks: frozenset[Annotated[int, Field(ge=0)]] = frozenset()

    def reason(self, *, step: int, steps: int, block: int, history: SlotHistory) -> str | None:
        """Return why the block must be evaluated, or None if the gate may decide.

        Args:
            step: Index of the step, 0 … steps − 1.
            steps: Steps of the run.
            block: Index of the block part.
            history: The slot's evaluations, all of this request: a slot is cleared when it is lent to another, so
                that a change of weights, sampler, shape or condition is a first use.
        """
        age = history.age(step)
        if age is None:
            return "first use"
        if step < self.warmup_steps:
            return "warm-up"
        if step >= steps - self.final_steps:
            return "final steps"
        if age > self.max_age_steps:
            return "maximum age"
        if block in self.protected_blocks:
            return "protected block"
        return None


def doubtful(signals: Sequence[Signals] | None) -> bool:
    """Whether any branch's signals are not finite: then nothing can be said of the slot, and the block is evaluated."""
    return signals is not None and not all(branch.finite for branch in signals)
