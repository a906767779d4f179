"""Guards: conditions under which a block is evaluated whatever a gate says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from adacorr_deploy.caching.decisions import Signals

NOT_FINITE: Final = "signals not finite"
BEYOND_CALIBRATION: Final = "offset beyond calibration"
TRIPS: Final = frozenset({NOT_FINITE, BEYOND_CALIBRATION})  # reasons that only a measurement gives: an operator's alarm


class Guards(BaseModel):
    """Evaluate on first use, in the first and last steps, past a maximum age, and in protected blocks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_steps: Annotated[int, Field(ge=0, le=1000)] = 2
    final_steps: Annotated[int, Field(ge=0, le=1000)] = 1
    max_age_steps: Annotated[int, Field(ge=1, le=1000)] = 6
    protected_blocks: frozenset[Annotated[int, Field(ge=0)]] = frozenset()

    def reason(self, *, step: int, steps: int, age: int | None, parts: Iterable[int] = ()) -> str | None:
        """Return why block parts must be evaluated, or None if the gate may decide.

        Args:
            step: Index of the step, 0 … steps − 1.
            steps: Steps of the run.
            age: Steps since its slot was filled by this request, None before the first time. A slot is cleared when it
                is lent to another request, so a change of weights, sampler, shape or condition is a first use.
            parts: Indices of the block parts that are decided together; none for what holds for any of the step.
        """
        if age is None:
            return "first use"
        if step < self.warmup_steps:
            return "warm-up"
        if step >= steps - self.final_steps:
            return "final steps"
        if age > self.max_age_steps:
            return "maximum age"
        return "protected block" if self.protected_blocks.intersection(parts) else None


def doubtful(signals: Sequence[Signals] | None) -> bool:
    """Whether any branch's signals are not finite: then nothing can be said of the slot, and the block is evaluated."""
    return signals is not None and not all(branch.finite for branch in signals)
