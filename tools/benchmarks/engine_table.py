"""The table of the engines' benchmark: figures made of rows, held to the goals of the issue."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from engine_rows import BLOCKS, COMPILED, COMPILING, MONOLITH, PYTORCH, SERVICES, Arm, Case, Row

Rows = Mapping[Arm, Row]  # of one case
Figures = Mapping[str, float]

OVERHEAD: Final = "µs/launch"
OF_MONOLITH: Final = "÷ monolith"
OF_COMPILED: Final = "÷ compiled"
EFFICIENCY: Final = "efficiency"
ONE_BLOCK: Final = "one block ÷ step"  # of signals and blend
ALL_BLOCKS: Final = "all blocks ÷ step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a figure of some arms is held to."""

    figure: str
    text: str
    is_met: Callable[[float], bool]
    applies: Callable[[Case, Arm], bool]


def _is_chain(arm: Arm) -> bool:
    """Whether it is the whole chain as the product runs it: with graphs, where the backend makes any."""
    return arm.engine == BLOCKS and arm.rho == 0 and arm.graphs == (arm.backend in COMPILING)


def _is_services_of_xl(case: Case, arm: Arm) -> bool:
    return arm.engine == SERVICES and case.size.startswith("XL")


GOALS: Final = (
    Goal(figure=OF_MONOLITH, text="≤ 1.03", is_met=lambda x: x <= 1.03, applies=lambda _, arm: _is_chain(arm)),
    Goal(figure=OF_COMPILED, text="< 1", is_met=lambda x: x < 1, applies=lambda _, arm: _is_chain(arm)),
    Goal(
        figure=EFFICIENCY,
        text="≥ 0.95 at ρ 0.5",
        is_met=lambda x: x >= 0.95,
        applies=lambda _, arm: arm.engine == BLOCKS and arm.rho == 0.5 and not arm.decided_by,
    ),
    Goal(figure=ONE_BLOCK, text="< 1 %", is_met=lambda x: x < 0.01, applies=_is_services_of_xl),
    Goal(figure=ALL_BLOCKS, text="< 1 %", is_met=lambda x: x < 0.01, applies=_is_services_of_xl),
)


# --- Figures ---------------------------------------------------------------------------------------------------------


def figures(row: Row, rows: Rows) -> Figures:
    """Return what can be said of a row beside the others of its case; a figure that lacks its partner is left out.

    µs/launch           (chain − monolith) ÷ blocks, both with graphs or both without
    ÷ monolith          time over that of the backend's monolith, both with graphs or both without
    ÷ compiled          time over torch.compile's
    efficiency          speed-up over the same chain without reuse, × (1 − ρ), with the ρ that was reached
    one block ÷ step    signals and blend of one block, over a step of the chain: `robust` measures one block a step
    all blocks ÷ step   the same of every block: the paper's policies measure each, and may blend it
    """
    arm = row.arm
    if row.failed:
        return {}
    if arm.engine == SERVICES:
        return _shares_of_step(row, rows)
    found = {}
    monolith = _measured(rows, Arm(backend=arm.backend, engine=MONOLITH, graphs=arm.graphs))
    if monolith is not None and arm.engine == BLOCKS:
        found[OF_MONOLITH] = row.step_ms / monolith.step_ms
        if arm.rho == 0:
            found[OVERHEAD] = 1000 * (row.step_ms - monolith.step_ms) / row.blocks
    compiled = _measured(rows, Arm(backend=PYTORCH, engine=COMPILED))
    if compiled is not None and row is not compiled:
        found[OF_COMPILED] = row.step_ms / compiled.step_ms
    whole = _measured(rows, replace(arm, rho=0.0))
    if whole is not None and arm.rho > 0:
        found[EFFICIENCY] = whole.step_ms / row.step_ms * (1 - row.rho)
    return found


def _shares_of_step(row: Row, rows: Rows) -> Figures:
    backend = row.arm.backend
    chain = _measured(rows, Arm(backend=backend, engine=BLOCKS, graphs=backend in COMPILING))
    if chain is None:
        return {}
    share = row.step_ms / chain.step_ms
    return {ONE_BLOCK: share / row.blocks, ALL_BLOCKS: share}


def _measured(rows: Rows, arm: Arm) -> Row | None:
    row = rows.get(arm)
    return None if row is None or row.failed else row


def goals_of(row: Row, found: Figures) -> list[Goal]:
    """Return the goals that a row is held to."""
    return [goal for goal in GOALS if goal.figure in found and goal.applies(row.case, row.arm)]


# --- Text ------------------------------------------------------------------------------------------------------------

_HEAD: Final = (
    "row",
    "ms/step",
    OVERHEAD,
    f"{OF_MONOLITH} (≤ 1.03)",
    f"{OF_COMPILED} (< 1)",
    f"{EFFICIENCY} (≥ 0.95)",
    f"{ONE_BLOCK} (< 1 %)",
    f"{ALL_BLOCKS} (< 1 %)",
    "graphs/step",
    "error",
)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table per case with its remarks, and what became of each goal."""
    cases: dict[Case, dict[Arm, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.arm] = row
    for case, of_case in cases.items():
        yield f"\n{case}, {case.steps} steps, engines for batches {', '.join(map(str, case.profile))}\n"
        yield from _markdown([_HEAD, *(_cells(row, of_case) for row in of_case.values() if not row.failed)])
        yield from _remarks(of_case.values())
    found = [(row, figures(row, of_case)) for of_case in cases.values() for row in of_case.values()]
    yield "\nGoals\n"
    for goal in GOALS:
        yield from _of_goal(goal, found)


def _cells(row: Row, rows: Rows) -> tuple[str, ...]:
    found = figures(row, rows)
    said = {goal.figure: "met" if goal.is_met(found[goal.figure]) else "missed" for goal in goals_of(row, found)}

    def cell(figure: str, form: str) -> str:
        return f"{found[figure]:{form}} {said.get(figure, '')}".strip() if figure in found else ""

    return (
        str(row.arm),
        f"{row.step_ms:.3f}",
        cell(OVERHEAD, ".1f"),
        cell(OF_MONOLITH, ".3f"),
        cell(OF_COMPILED, ".3f"),
        cell(EFFICIENCY, ".3f"),
        cell(ONE_BLOCK, ".2%"),
        cell(ALL_BLOCKS, ".2%"),
        f"{row.graph_launches:.1f}" if row.graph_launches else "",
        f"{row.error:.1e}" if row.error is not None else "",
    )


def _markdown(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for index, line in enumerate(cells):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        if index == 0:
            yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"


def _remarks(rows: Collection[Row]) -> Iterator[str]:
    """Yield a line per remark, with the rows that share it."""
    sharing: dict[str, list[Arm]] = {}
    for row in rows:
        if row.remark:
            sharing.setdefault(f"failed: {row.remark}" if row.failed else row.remark, []).append(row.arm)
    if sharing:
        yield ""
    for remark, arms in sharing.items():
        every = [row.arm for row in rows if row.arm.backend == arms[0].backend]
        yield f"- {remark} ({f'every row of {arms[0].backend}' if arms == every else '; '.join(map(str, arms))})"


def _of_goal(goal: Goal, found: Sequence[tuple[Row, Figures]]) -> Iterator[str]:
    held = [(row, figure[goal.figure]) for row, figure in found if goal in goals_of(row, figure)]
    missed = [(row, value) for row, value in held if not goal.is_met(value)]
    outcome = f"met by {len(held) - len(missed)} of {len(held)} rows" if held else "no row to hold to it"
    yield f"- {goal.figure} {goal.text}: {outcome}"
    yield from (f"  - missed: {row.case}, {row.arm}: {value:.4g}" for row, value in missed)
