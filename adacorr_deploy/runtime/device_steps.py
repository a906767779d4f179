"""Steps as graphs whose blocks are decided while they run, bound once per workspace, and what they keep there.

Of a slot the host knows nothing meanwhile: when it was filled stands in device memory, and its one entry is the ring's
first. A case that evaluates notes by itself that it has run, so that what ran is counted apart from what was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.block_rules import BlockRule
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Backend, Buffer, Launch
from adacorr_deploy.engines.decision_graphs import DECIDE_ON_HOST, BlockDecision, DecisionGraphs, Switch
from adacorr_deploy.plugins.decision_kernels import CASES, NEVER, RECORD_COLUMNS, RULE_COLUMNS, Verdict, rule_row
from adacorr_deploy.runtime.buffers import Factors
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.workspace import Reading, Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionBuffers:
    """What decisions read and leave, for L block parts and S steps."""

    filled: Buffer  # (L, 1) int64: the step of a slot's last evaluation, or NEVER
    launches: Buffer  # (L, 1) int64: evaluations that ran
    rules: Buffer  # (L, 9) int64
    thresholds: Buffer  # (L, 3) float32: of the blends
    trace: Buffer  # (S, L, 5) int64
    one: Buffer  # (1,) float32: the coefficient of a held evaluation

    @classmethod
    def allocate(cls, backend: Backend, *, steps: int, blocks: int) -> DecisionBuffers:
        """Allocate them in a backend's memory.

        Raises:
            EngineError: If the memory can't be had.
        """
        buffers = cls(
            filled=backend.allocate((blocks, 1), DType.INT64),
            launches=backend.allocate((blocks, 1), DType.INT64),
            rules=backend.allocate((blocks, len(RULE_COLUMNS)), DType.INT64),
            thresholds=backend.allocate((blocks, 3), DType.FLOAT32),
            trace=backend.allocate((steps, blocks, len(RECORD_COLUMNS)), DType.INT64),
            one=backend.allocate((1,), DType.FLOAT32),
        )
        buffers.one.write(np.ones(1, dtype=np.float32))
        return buffers


class DecidedSteps:
    """The two graphs of a run's steps: between one step and the next, the latents change places."""

    def __init__(
        self,
        backend: Backend,
        space: Workspace,
        slots: Sequence[CacheSlot],
        *,
        steps: int,
        images: int,
        fresh_gates: bool,
    ) -> None:
        """Bind and record everything; engines that have not run yet are run, over whatever is in the buffers.

        Args:
            backend: Whose graphs they are.
            space: Of the run's size.
            slots: Of the workspace, lent with their references.
            steps: S.
            images: B.
            fresh_gates: Whether a slot's results are weighed by the gates of the present step, and not by their own.

        Raises:
            EngineError: If the backend has no such graphs, or can't record an engine.
        """
        graphs = backend.decision_graphs()
        self._graphs = graphs
        self._buffers = DecisionBuffers.allocate(backend, steps=steps, blocks=len(slots))
        parts = [
            _Block(graphs, space, slot, self._buffers, block=block, images=images, fresh_gates=fresh_gates)
            for block, slot in enumerate(slots)
        ]
        self._evaluations = [part.evaluation for part in parts]
        blocks = [launch for part in parts for launch in part.work]
        self._steps = [
            graphs.record(
                f"step {parity}",
                [
                    *space.bound.collected(partial(space.embed, parity)),
                    *blocks,
                    *space.bound.collected(partial(space.head, parity, None)),
                ],
            )
            for parity in (0, 1)
        ]

    def begin(self, rules: Sequence[BlockRule]) -> None:
        """Write the rules of a request, and forget the one before."""
        buffers = self._buffers
        buffers.rules.write(np.stack([rule_row(rule) for rule in rules]))
        buffers.thresholds.write(np.array([rule.thresholds for rule in rules], dtype=np.float32))
        buffers.filled.write(np.full((len(rules), 1), NEVER, dtype=np.int64))
        buffers.launches.write(np.zeros((len(rules), 1), dtype=np.int64))
        buffers.trace.write(np.full(buffers.trace.shape, NEVER, dtype=np.int64))

    def run(self, step: int) -> None:
        """Queue a step, which `Workspace.begin_step` began."""
        self._steps[step % 2].run()

    def launches(self) -> Reading:
        """Ask for the evaluations that ran so far, (L, 1)."""
        return self._buffers.launches.read_later()

    def trace(self) -> Reading:
        """Ask for the decisions, for `verdicts`."""
        return self._buffers.trace.read_later()

    def count(self, launches: NDArray[np.generic]) -> None:
        """Let the blocks' sessions count the evaluations of a request, (L, 1)."""
        for evaluation, times in zip(self._evaluations, launches[:, 0].tolist(), strict=True):
            self._graphs.count(evaluation, int(times))


class _Block:
    """One block of a step: the signals of its input, the decision, and what each answer means."""

    def __init__(
        self,
        graphs: DecisionGraphs,
        space: Workspace,
        slot: CacheSlot,
        buffers: DecisionBuffers,
        *,
        block: int,
        images: int,
        fresh_gates: bool,
    ) -> None:
        step, filled, reference = space.image.step, buffers.filled[block], _reference(slot)
        given, following = space.block_input(block), space.block_output(block)
        factors = Factors(coefficients=buffers.one, gate_steps=step if fresh_gates else filled)
        launches = space.bound.collected

        def predicted(tokens: Buffer, tokens_out: Buffer) -> Callable[[], None]:
            return lambda: space.predict_held(block, slot, factors, tokens, tokens_out)

        evaluate = launches(lambda: space.evaluate(block, slot))
        refill = (
            graphs.copy(reference, given),
            graphs.note_evaluation(step=step, filled=filled, launches=buffers.launches[block]),
        )
        correct = (
            *launches(predicted(reference, space.blocks.estimate)),  # before the evaluation replaces the entry
            *launches(lambda: space.evaluate(block, slot, aside=True)),
            *refill,
            *launches(lambda: space.blend_scored(block, slot, buffers.thresholds[block])),
        )
        decision = BlockDecision(
            signals=space.blocks.signals,
            step=step,
            filled=filled,
            rule=buffers.rules[block],
            scores=space.blocks.scores,
            trace=buffers.trace,
            images=images,
            block=block,
        )
        cases = ((*evaluate, *refill), launches(predicted(given, following)), correct)
        self.evaluation = evaluate[0]
        self.work: tuple[Launch | Switch, ...] = (
            *launches(lambda: space.input_signals(block, slot)),
            Switch(decision=decision, cases=cases),
        )


def _reference(slot: CacheSlot) -> Buffer:
    if slot.reference is None:
        raise EngineError("The slot keeps no reference input, which decisions are made by. Lend it with one.")
    return slot.reference


def verdicts(trace: NDArray[np.int64], launches: NDArray[np.int64]) -> list[list[Verdict]]:
    """Return the decisions of each step and block part, from a whole request's trace.

    Args:
        trace: (S, L, 5), as `DecidedSteps.trace` gives it.
        launches: (L, 1): evaluations that ran.

    Raises:
        EngineError: If what ran is not what was decided, so that the result can't be trusted.
    """
    evaluated = (trace[:, :, 0] != CASES.index("reuse")).sum(axis=0)
    if (trace[:, :, 0] == NEVER).any() or (evaluated != launches[:, 0]).any():
        raise EngineError(
            f"The GPU's graphs decided for {evaluated.tolist()} evaluations of the blocks and ran "
            f"{launches[:, 0].tolist()}: the driver did not follow the decisions. {DECIDE_ON_HOST}"
        )
    return [[Verdict.of(record) for record in blocks] for blocks in trace]
