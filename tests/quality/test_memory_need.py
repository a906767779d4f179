"""What doesn't fit is refused with both numbers and the option to lower; what is free is asked of the system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.quality import memory_need
from adacorr_deploy.quality.memory_need import available_bytes, require_memory

GIB = 1 << 30


def test_the_limit_itself_fits_and_a_byte_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_need, "available_bytes", lambda: 3 * GIB)
    require_memory(3 * GIB, what="Calibrating", lower="--images")
    message = r"Calibrating needs about 4\.5 GiB of memory, and 3\.0 GiB are free\. Lower --images, or use a larger"
    with pytest.raises(RequestError, match=message):
        require_memory(9 * GIB // 2, what="Calibrating", lower="--images")


def test_where_nobody_says_what_is_free_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_need, "available_bytes", lambda: None)
    require_memory(1 << 60, what="Calibrating", lower="--images")


def test_what_is_free_is_no_more_than_the_machine_has() -> None:
    free = available_bytes()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("meminfo", "group", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:    2048 kB\n", {}, 2 << 20),
        ("MemAvailable: 2048 kB\n", {"max": "max\n"}, 2 << 20),
        ("MemAvailable: 2048 kB\n", {"max": "4096\n"}, 4096),
        ("MemAvailable: 2048 kB\n", {"max": "4096\n", "current": "3000\n"}, 1096),
        ("MemAvailable: 2048 kB\n", {"max": "4096", "current": "3000", "stat": "anon 1\ninactive_file 200\n"}, 1296),
        ("MemAvailable: 2048 kB\n", {"max": "4096\n", "current": "5000\n"}, 0),
        ("MemAvailable: 2048 kB\n", {"max": str(1 << 40)}, 2 << 20),
        ("MemTotal: 9 kB\n", {}, 5 * 7),  # what sysconf says
        (None, {"max": "20"}, 20),
    ],
)
def test_what_a_containers_limit_leaves_counts_and_sysconf_stands_in(
    monkeypatch: pytest.MonkeyPatch, meminfo: str | None, group: dict[str, str], expected: int
) -> None:
    files = {"/proc/meminfo": meminfo, **{f"/sys/fs/cgroup/memory.{name}": text for name, text in group.items()}}

    def read_text(path: Path) -> str:
        text = files.get(str(path))
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 5, "SC_PAGE_SIZE": 7}.__getitem__)
    assert available_bytes() == expected
