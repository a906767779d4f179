"""What a bench ran on, in words that let another person judge its numbers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Final

_PACKAGES: Final = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch", "numpy")


def machine_facts(*, backend: str, hardware: str) -> dict[str, str]:
    """Return name → value: processor, cores, system, load, backend and versions.

    Args:
        backend: The backend's name.
        hardware: What its engines run on.
    """
    facts = {"backend": f"{backend} on {hardware}", "processor": _processor(), "cores": str(_cores())}
    facts["system"] = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if hasattr(os, "getloadavg"):
        facts["load when it ended"] = f"{os.getloadavg()[0]:.1f} (processes that wanted a core, this one included)"
    facts["versions"] = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := _version(name)))
    return facts


def _processor() -> str:
    """Return the processor's name; where /proc does not say it, what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine() or "unknown")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
