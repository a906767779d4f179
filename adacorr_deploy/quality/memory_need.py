"""Whether a measurement fits into this machine's memory, told before it starts and not by the kernel's killer."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import RequestError

_GIB: Final = 1 << 30
_GROUP: Final = Path("/sys/fs/cgroup")


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
    """Return the memory that can still be had, in a container what its limit leaves; None where nobody says so."""
    known = []
    with suppress(OSError, ValueError, StopIteration):  # what caches would give back counts, unlike in sysconf's number
        known.append(_number_of("MemAvailable:", Path("/proc/meminfo").read_text()) * 1024)
    if not known:
        with suppress(AttributeError, OSError, ValueError):  # AttributeError: Windows
            known.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # ValueError: "max"
        limit_bytes = int((_GROUP / "memory.max").read_text())
        known.append(max(limit_bytes - _used_in_container(), 0))
    return min(known, default=None)


def _used_in_container() -> int:
    """Return what counts against the container's limit, but for cached files, which the kernel would give back."""
    used = 0
    with suppress(OSError, ValueError, StopIteration):
        used = int((_GROUP / "memory.current").read_text())
        used -= _number_of("inactive_file", (_GROUP / "memory.stat").read_text())
    return used


def _number_of(name: str, text: str) -> int:
    return int(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])
