"""Measure one case of the engines' benchmark: the process that engine_jobs.py starts, with a job on its input."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from engine_arms import Bench, Runner, relative_error
from engine_jobs import GPU_LOST, JOB, Entry, Job, report
from engine_rows import Arm, Row
from models import say, timed

REASON_LETTERS = 300


def measure(job: Job) -> int:
    """Report a row for every arm; the exit code says whether the GPU still works."""
    with ExitStack() as resources:
        turns = Turns(job, Bench(job, resources))
        return 0 if turns.warm_up() and turns.measure() else GPU_LOST


class Turns:
    """The arms of a job, taken in turns; one that fails is out, with its reason for a row."""

    def __init__(self, job: Job, bench: Bench) -> None:
        self._job = job
        self._bench = bench
        self._runners: dict[Arm, Runner] = {}
        self._rows: dict[Arm, Row] = {}
        self._broken: dict[tuple[str, str, str], str] = {}  # what arms share that could not be opened, and why

    def warm_up(self) -> bool:
        """Open every arm and run it twice (graphs are captured in the second run); say whether the GPU still works."""
        for arm in self._job.arms:
            report(self._job.journal, Entry(began=arm))
            if self._attempt(arm, self._open) and not self._attempt(arm, self._warm_up):
                if not self._bench.works():
                    return False
        return True

    def measure(self) -> bool:
        """Time whole requests of every arm, round by round, and report the rows; say whether the GPU still works."""
        for index in range(self._job.rounds):
            say(f"  round {index + 1} of {self._job.rounds}")
            for arm in list(self._rows):
                report(self._job.journal, Entry(began=arm))
                if not self._attempt(arm, self._time) and not self._bench.works():
                    return False
        for row in self._rows.values():
            report(self._job.journal, Entry(row=row))
        return True
