"""One case of the engines' benchmark in a process of its own: what it is told, what it reports, what if it dies.

An engine that fails on a GPU can take its process along, or leave it unable to use the GPU. So the process notes what
it begins, and another goes on without the arm that ended it.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from engine_rows import Arm, Case, Row
from pydantic import TypeAdapter

GPU_LOST: Final = 3  # exit code of a process that can't use the GPU any more, after it reported the arm
SCRIPT: Final = Path(__file__).with_name("engine_case.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to measure in one process.

    Attributes:
        case: What is computed.
        arms: How, in this order.
        device: `cuda` or `cpu`, of PyTorch; a backend knows its own.
        rounds: Timed turns of every arm, after two that warm up.
        folder: Keeps ONNX files and engines of the model in this precision; what is there is used.
        journal: Where to report.
    """

    case: Case
    arms: tuple[Arm, ...]
    device: str
    rounds: int
    folder: Path
    journal: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A line of the journal: an arm that is begun or gone on with, or a finished row."""

    began: Arm | None = None
    row: Row | None = None


JOB: Final = TypeAdapter(Job)
_ENTRY: Final = TypeAdapter(Entry)


def report(journal: Path, entry: Entry) -> None:
    with journal.open("ab") as file:
        file.write(_ENTRY.dump_json(entry) + b"\n")


def rows_of_job(job: Job, script: Path = SCRIPT) -> list[Row]:
    """Return a row for every arm, measured in as many processes as it takes."""
    rows: list[Row] = []
    left = list(job.arms)
    while left:
        job.journal.write_bytes(b"")
        code = subprocess.run(
            [sys.executable, str(script)], input=JOB.dump_json(replace(job, arms=tuple(left))), check=False
        ).returncode
        found = _outcome(job, left, code)
        rows += found
        done = {row.arm for row in found}
        left = [arm for arm in left if arm not in done]
    return sorted(rows, key=lambda row: job.arms.index(row.arm))


def _outcome(job: Job, arms: Sequence[Arm], code: int) -> list[Row]:
    """Return what a process reported, and a row for the arm that ended it: all of them, if it began none."""
    entries = [_ENTRY.validate_json(line) for line in job.journal.read_bytes().splitlines()]
    rows = [entry.row for entry in entries if entry.row is not None]
    done = {row.arm for row in rows}
    began = [entry.began for entry in entries if entry.began is not None]
    blamed = began[-1:] or list(arms)
    if code == GPU_LOST and rows:
        blamed = []  # it is among the rows
    reason = f"its process ended {_manner(code)}"
    return rows + [Row(case=job.case, arm=arm, remark=reason) for arm in blamed if arm not in done]


def _manner(code: int) -> str:
    return f"with {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
