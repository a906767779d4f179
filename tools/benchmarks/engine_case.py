"""Measure one case of the engines' benchmark: the process that engine_jobs.py starts, with a job on its input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

from engine_arms import Bench, Runner
from engine_jobs import GPU_LOST, JOB, Entry, Job, report
from engine_rows import Arm, Row
from machine import say
from models import timed

from adacorr_deploy.core.errors import AdaCorrError

_REASON_LETTERS: Final = 300


class Turns:
    """The arms of a job, taken in turns; one that fails is out, with the reason in its row."""

    def __init__(self, job: Job, bench: Bench) -> None:
        self._job = job
        self._bench = bench
        self._runners: dict[Arm, Runner] = {}
        self._rows: dict[Arm, Row] = {}

    def measure(self) -> bool:
        """Report a row for every arm, and say whether the GPU still works; if it doesn't, not every arm has one."""
        if not all(self._survives(arm, self._warm_up) for arm in self._job.arms):
            return False
        for index in range(self._job.rounds):
            say(f"  round {index + 1} of {self._job.rounds}")
            if not all(self._survives(arm, self._time) for arm in list(self._rows)):
                return False
        for row in self._rows.values():
            report(self._job.journal, Entry(row=row))
        return True

    def _survives(self, arm: Arm, work: Callable[[Arm], Row]) -> bool:
        """Work on an arm; if it fails, give it up, and say whether the others can go on."""
        report(self._job.journal, Entry(began=arm))
        try:
            self._rows[arm] = work(arm)
        except Exception as error:  # noqa: BLE001 - whatever an arm fails of is its result
            self._rows.pop(arm, None)
            self._runners.pop(arm, None)
            row = Row(case=self._job.case, arm=arm, remark=reason_of(error))
            say(f"  {arm}: {row.remark}")
            report(self._job.journal, Entry(row=row))
            return self._bench.works()
        return True

    def _warm_up(self, arm: Arm) -> Row:
        """Open an arm and run it twice: the second run captures graphs, and may replay them."""
        say(f"  {arm}")
        runner = self._runners[arm] = self._bench.runner(arm)
        runner()
        launched = self._bench.graph_launches(arm)
        outcome = runner()
        return Row(
            case=self._job.case,
            arm=arm,
            blocks=self._bench.blocks,
            rho=outcome.rho,
            graph_launches=(self._bench.graph_launches(arm) - launched) / self._job.case.steps,
            error=self._bench.error(outcome),
            remark=self._bench.remark(arm),
        )

    def _time(self, arm: Arm) -> Row:
        row = self._rows[arm]
        return replace(row, seconds=(*row.seconds, timed(self._runners[arm])))


def reason_of(error: Exception) -> str:
    """Return one line."""
    text = " ".join(str(error).split()) or "no reason given"
    return (text if isinstance(error, AdaCorrError) else f"{type(error).__name__}: {text}")[:_REASON_LETTERS]


def main() -> int:
    job = JOB.validate_json(sys.stdin.buffer.read())
    with ExitStack() as resources:
        try:
            bench = Bench(job, resources)
        except Exception as error:  # noqa: BLE001 - whatever it is, no arm can run
            for arm in job.arms:
                report(job.journal, Entry(row=Row(case=job.case, arm=arm, remark=reason_of(error))))
            return 0
        return 0 if Turns(job, bench).measure() else GPU_LOST


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the terminal interrupts both processes; the one that started this one says so
        sys.exit(130)
