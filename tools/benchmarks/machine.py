"""The machine that a benchmark runs on, and its terminal."""

from __future__ import annotations

import sys
from pathlib import Path


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
