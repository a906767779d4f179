"""The table of policies, as `adacorr-bench --list` shows it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from adacorr_deploy.cli.console import Cell, show_json, show_lines, show_table

if TYPE_CHECKING:
    from adacorr_deploy.caching.gates.rule import GateSettings
    from adacorr_deploy.caching.policy import Policy

_COLUMNS: Final = (
    "policy",
    "observes",
    "gate",
    "spans",
    "predictor",
    "corrector",
    "warm-up, last, age",
    "decides by",
    "calibrated",
    "@ sets",
    "paper",
)
_BRIEF: Final = ("policy", "observes", "spans", "calibrated", "@ sets")  # what a terminal has room for
_WIDTH: Final = 400  # a row a line, for grep
_ALL: Final = "Every column: adacorr-bench --list | less -S. Every setting: adacorr-bench --list --json."
_ON_TOP: Final = (
    "With AdaCorrection on top: NAME+adacorrection, NAME+adacorrection@2 (a target speed-up), where NAME keeps "
    "anything and is not AdaCorrection itself; such a policy needs a calibration. With the paper's own weight, where "
    "NAME keeps something of blocks: NAME+paper-lazy (needs a calibration), and NAME+paper-exact, the reference, which "
    "evaluates everything and saves nothing. With skipped steps taken again, interpolated, once the next evaluation is "
    "known, which launches no block: NAME+revised (part of NAME+adacorrection where NAME's blocks decide together)."
)


def show_policies(*, as_json: bool) -> None:
    """Print every preset with its pieces, and those that a file completes."""
    from adacorr_deploy.caching.policy import FILE_PRESETS, PRESETS

    if as_json:
        show_json([_described(policy) for policy in PRESETS.values()])
        return
    rows = [_row(policy) for policy in PRESETS.values()]
    rows += [_file_row(name, gate) for name, gate in FILE_PRESETS.items()]
    brief = sys.stdout.isatty() and shutil.get_terminal_size().columns < _WIDTH
    columns = _BRIEF if brief else _COLUMNS
    shown = [[row[_COLUMNS.index(column)] for column in columns] for row in rows]
    show_table(columns, shown, piped_width=_WIDTH)
    show_lines(_ON_TOP, *([_ALL] if brief else []))


def _described(policy: Policy) -> Mapping[str, object]:
    gate = policy.gate
    return {
        **policy.model_dump(mode="json", by_alias=True),
        "needs_calibration": policy.needs_calibration,
        "needs_profile": sorted(policy.quantities),
        "signal": gate.signal,
        "paper": _paper(policy) or "",
        "knob": gate.knob,
        "knob_meaning": gate.knob_meaning,
    }


def _row(policy: Policy) -> tuple[Cell, ...]:
    gate, guards = policy.gate, policy.guards
    profiled = [f"profile: {quantity}" for quantity in sorted(policy.quantities)]
    needs = [*(["calibration"] if policy.needs_calibration else []), *profiled]
    limits = f"{guards.warmup_steps}, {guards.final_steps}, {guards.max_age_steps}"
    return (
        policy.name,
        gate.signal,
        _fields(gate),
        policy.division.label if policy.caches else None,
        policy.predictor.label if policy.caches else None,
        getattr(gate, "corrector", None) and gate.model_dump(mode="json")["corrector"],
        limits if policy.caches else None,
        policy.placement.value if policy.placement is not None else None,
        ", ".join(needs) or "no",
        gate.knob or None,
        _paper(policy),
    )


def _file_row(name: str, gate: type[GateSettings]) -> tuple[Cell, ...]:
    kind, guards = gate.model_fields["kind"].default, "1, 0, 1000"
    return (
        f"{name}@FILE",
        gate.signal,
        kind,
        "parts",
        "gated",
        None,
        guards,
        None,
        "a file",
        "FILE",
        gate.paper or None,
    )


def _paper(policy: Policy) -> str | None:
    from adacorr_deploy.caching.policy import PAPERS

    return policy.gate.paper or PAPERS.get(policy.name)


def _fields(gate: GateSettings) -> str:
    """Return a gate in one line: its kind, then its settings; what is empty says nothing."""
    settings = gate.model_dump(mode="json", by_alias=True)
    shown = [settings.pop("kind"), *(f"{name} {value}" for name, value in settings.items() if value is not None)]
    return ", ".join(shown)
