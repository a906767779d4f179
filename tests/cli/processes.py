"""Commands as processes of their own, as they are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import IO


def command_line(name: str, *arguments: object, before: str = "") -> list[str]:
    """Return what runs `adacorr-NAME`, after some lines of Python."""
    # A background shell starts its children with SIGINT ignored; a terminal does not.
    script = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
from adacorr_deploy.cli import scripts
scripts.{name}()
"""
    return [sys.executable, "-c", script, *map(str, arguments)]


def ended(
    command: list[str],
    *,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
    encoding: str = "utf-8",
    at_start: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with streams and an encoding of its own."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(
        command, stdout=stdout, stderr=stderr, env=environment, preexec_fn=at_start, check=False, text=True
    )
