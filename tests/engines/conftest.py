"""Fixtures of the tests that need a GPU, or the stand-in for its driver."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest

from adacorr_deploy.engines.device import Device

DriverCount = Callable[[str], int]


@pytest.fixture
def device() -> Iterator[Device]:
    """Open a GPU for one test."""
    with Device.open() as opened:
        yield opened


@pytest.fixture
def driver_count() -> DriverCount:
    """Return what asks the stand-in driver how often something happened or how much is alive; skip on a real one."""
    if "STAND_IN_DRIVER" not in os.environ:
        pytest.skip("only the stand-in driver counts what it holds")
    library = ctypes.CDLL("libcuda.so.1")
    library.stand_in_count.restype = ctypes.c_long

    def count(what: str) -> int:
        return int(library.stand_in_count(what.encode()))

    return count
