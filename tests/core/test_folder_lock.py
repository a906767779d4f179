"""One process holds a folder's lock at a time, until it leaves the block or dies."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adacorr_deploy.core.folder_lock import locked

HOLDER = """
import sys
from pathlib import Path
from adacorr_deploy.core.folder_lock import locked

with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def is_free(folder: Path) -> bool:
    with locked(folder, wait=False) as held:
        return held


def test_a_lock_is_held_by_one_and_ends_with_its_block(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        assert held
        assert not is_free(tmp_path)
    assert is_free(tmp_path)
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert is_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not is_free(tmp_path)
        holder.kill()
        holder.wait()
        assert is_free(tmp_path)


def test_who_waits_comes_in_one_after_the_other(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter(_: int) -> int:
        with locked(tmp_path):
            inside.append(1)
            most = len(inside)
            os.sched_yield()
            inside.pop()
            return most

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(enter, range(100))) == {1}


def test_without_a_lock_the_block_runs_and_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_free(tmp_path / "missing")

    def no_locks_here(descriptor: int, operation: int) -> None:
        raise OSError("Bad file descriptor")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_locks_here)
        assert not is_free(tmp_path)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert not is_free(tmp_path)
