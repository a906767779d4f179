"""Graphs that decide while they run: what the runtime may ask of a backend for the placement `device`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from adacorr_deploy.core.errors import EngineError

if TYPE_CHECKING:
    from adacorr_deploy.engines.backend import Buffer, Launch

DECIDE_ON_HOST: Final = 'Let the host decide: with decide = "block" in the policy file.'


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDecision:
    """One block's decision, taken anew whenever the graph runs (`plugins/cuda/decisions.cu`).

    Attributes:
        signals: (R, 9) float32: those of the block's input, made before.
        step: (1,) int64: the present one.
        filled: (1,) int64: the step of the slot's last evaluation, or `plugins.decision_kernels.NEVER`.
        rule: (9,) int64: `plugins.decision_kernels.rule_row`.
        scores: (R,) float32, out: what a correction's blend weighs.
        trace: (S, L, 5) int64, out: the record of each step and block part.
        images: B, of R rows.
        block: Index of the block part.
    """

    signals: Buffer
    step: Buffer
    filled: Buffer
    rule: Buffer
    scores: Buffer
    trace: Buffer
    images: int
    block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A decision, and what is launched for each answer, in the order of `plugins.decision_kernels.CASES`."""

    decision: BlockDecision
    cases: tuple[tuple[Launch, ...], ...]


class DecisionGraphs(Protocol):
    """Makes such graphs. Their launches are the backend's own, and may also be run by themselves."""

    def copy(self, target: Buffer, source: Buffer) -> Launch:
        """Return a copy between two buffers of one shape and dtype, as a launch."""
        ...

    def note_evaluation(self, *, step: Buffer, filled: Buffer, launches: Buffer) -> Launch:
        """Return what ends a case that evaluates: filled ← step, launches ← launches + 1; all (1,) int64."""
        ...

    def record(self, name: str, work: Sequence[Launch | Switch]) -> Launch:
        """Return one launch that does all this in order. What has not run yet is run once, over whatever is there.

        Each run counts the launches that stand outside of switches; those inside are for `count`.

        Raises:
            EngineError: If something of it can't be recorded; the message names it and says why.
        """
        ...

    def count(self, launch: Launch, times: int) -> None:
        """Let the session of a launch count runs that graphs have decided for."""
        ...


def no_decisions(backend: str, why: str) -> EngineError:
    """Return the error of a backend without such graphs."""
    return EngineError(f"Backend {backend} can't decide on the device: {why}. {DECIDE_ON_HOST}")
