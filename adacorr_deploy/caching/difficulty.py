"""How hard a request is: its measured prediction errors against those of the calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from adacorr_deploy.caching.calibration import Probe
from adacorr_deploy.caching.decisions import SlotHistory


@dataclass(slots=True, kw_only=True)
class Difficulty:
    """A request's difficulty: a running mean of ln((measured ÷ expected)^(2·slope)), exponentiated.

    Attributes:
        probe: What calibration expects.
        adaptivity: See `AdaCorrectionGate`.
        memory: See `AdaCorrectionGate`.
    """

    probe: Probe
    adaptivity: float
    memory: float
    _log_error: float = 0.0
    _measured_at: dict[int, tuple[int, int]] = field(default_factory=dict)  # step → distance and gap of its error

    @property
    def value(self) -> float:
        """Squared error of this request's predictions over that of calibration's, to the power of the adaptivity."""
        return math.exp(self.adaptivity * self._log_error)

    def expect(self, step: int, history: SlotHistory) -> None:
        """Note from which evaluations the error of a step, which comes later, was predicted."""
        self._measured_at[step] = (step - history.steps[0], gap_of(history))

    def record(self, step: int, error: float) -> None:
        """Take the relative error of a step; one that says nothing leaves the difficulty as it is."""
        distance, gap = self._measured_at.pop(step)
        cube = self.probe.expected[step]
        expected = cube[min(gap, len(cube)) - 1][min(distance, len(cube[0])) - 1]
        if expected > 0 and error > 0 and math.isfinite(error):
            measured = 2 * self.probe.slope * math.log(error / expected)
            self._log_error = self.memory * self._log_error + (1 - self.memory) * measured


def gap_of(history: SlotHistory) -> int:
    """Steps between the last two evaluations; 1 before there are two."""
    return history.steps[0] - history.steps[1] if len(history.steps) > 1 else 1
