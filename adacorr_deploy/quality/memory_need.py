"""Whether a measurement fits into this machine's memory, told before it starts and not by the kernel's killer."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import RequestError

_GIB: Final = 1 << 30


def require_memory(needed_bytes: int, *, what: str, lower: str) -> None:
    """Refuse what needs more memory than is free.

    Args:
        needed_bytes: An estimate.
        what: Is to be done, as the message's subject.
        lower: The option that makes it less.

    Raises:
        RequestError: If it doesn't fit.
    """
    free_bytes = available_bytes()
    if free_bytes is not None and needed_bytes > free_bytes:
        raise RequestError(
            f"{what} needs about {needed_bytes / _GIB:.1f} GiB of memory, and {free_bytes / _GIB:.1f} GiB are free. "
            f"Lower {lower}, or use a larger machine."
        )


def available_bytes() -> int | None:
    """Return the memory that can still be had, in a container no more than its limit; None where nobody says so."""
    known = []
    with suppress(OSError, ValueError, StopIteration):  # what caches would give back counts, unlike in sysconf's number
        lines = Path("/proc/meminfo").read_text().splitlines()
        known.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    if not known:
        with suppress(AttributeError, OSError, ValueError):  # AttributeError: Windows
            known.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # ValueError: "max"
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=None)
