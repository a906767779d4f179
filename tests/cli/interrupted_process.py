"""Commands as processes of their own, to be interrupted as a terminal does."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cli.processes import command_line

TIMEOUT_SECONDS = 90.0


@dataclass
class Terminal:
    """A process whose standard error is a terminal."""

    process: subprocess.Popen[str]
    master: int
    shown: str = ""

    def wait_for_file(self, folder: Path, pattern: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not any(folder.glob(pattern)):
            assert self.process.poll() is None, f"ended before it was interrupted: {self.shown}{self._rest()}"
            assert time.monotonic() < deadline, "never got so far"
            time.sleep(0.005)

    def wait_for_text(self, text: str) -> None:
        while text not in self.shown:
            piece = self._read()
            assert piece, f"ended before it showed {text!r}: {self.shown}"
            self.shown += piece

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit code, and all that was shown on the terminal."""
        self.process.send_signal(number)
        self.shown += self._rest()
        code = self.process.wait(TIMEOUT_SECONDS)
        os.close(self.master)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        return code, self.shown

    def _read(self) -> str:
        try:
            return os.read(self.master, 4096).decode(errors="replace")
        except OSError:  # how Linux says that the last process on a terminal has gone
            return ""

    def _rest(self) -> str:
        rest = ""
        while piece := self._read():
            rest += piece
        return rest


def started(name: str, *arguments: object) -> Terminal:
    """Start `adacorr-NAME`."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command_line(name, *arguments), stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    return Terminal(process, master)
