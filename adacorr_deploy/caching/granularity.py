"""Granularity: which block parts are decided on together, and what each span keeps."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from adacorr_deploy.caching.decisions import Span, SpanCache, whole_step_spans
from adacorr_deploy.caching.run import Run
from adacorr_deploy.core.errors import PolicyError


class Granularity(str, Enum):
    PARTS = "parts"  # every block part by itself
    RANGE = "range"  # a range of parts as one
    STEP = "step"  # the whole step, by the model's output


class Spans(BaseModel):
    """How a policy divides a bundle's block parts.

    Attributes:
        granularity: See `Granularity`.
        first: Blocks at the start that are always evaluated; all units of a block in halves.
        last: The same at the end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    granularity: Granularity
    first: Annotated[int, Field(ge=0, le=1000)] = 0
    last: Annotated[int, Field(ge=0, le=1000)] = 0

    @property
    def label(self) -> str:
        edges = [f"first {self.first}"] if self.first else []
        edges += [f"last {self.last}"] if self.last else []
        return self.granularity.value + (f" ({', '.join(edges)} evaluated)" if edges else "")

    def of_run(self, run: Run, cache: SpanCache, *, policy: str) -> tuple[Span, ...]:
        """Return the spans of a run.

        Args:
            run: The request and its bundle.
            cache: What a span keeps that is not always evaluated.
            policy: The policy's name, for the message.

        Raises:
            PolicyError: If the bundle has not one block part more than those that are always evaluated.
        """
        blocks = run.whole_blocks
        first = run.parts_of_blocks(0, self.first)
        stop = run.blocks - run.parts_of_blocks(max(blocks - self.last, 0), blocks)
        if first >= stop:
            raise PolicyError(
                f"policy {policy}: it always evaluates the first {self.first} and the last {self.last} blocks, and "
                f"the bundle has {blocks}: nothing is left to reuse. Lower spans.first or spans.last."
            )
        match self.granularity:
            case Granularity.STEP:
                return whole_step_spans(run.blocks)
            case Granularity.RANGE:
                edges = (_uncached(0, first), Span(first=first, stop=stop, cache=cache), _uncached(stop, run.blocks))
                return tuple(span for span in edges if span.parts)
            case Granularity.PARTS:
                return tuple(
                    Span(first=part, stop=part + 1, cache=cache if first <= part < stop else SpanCache.NONE)
                    for part in range(run.blocks)
                )


def _uncached(first: int, stop: int) -> Span:
    return Span(first=first, stop=stop, cache=SpanCache.NONE)
