"""Ctrl-C and SIGTERM: both end a command as an exception does, so that half-made files are removed on the way out."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130  # as a shell says of a command that Ctrl-C ended
TERMINATED: Final = 143

_UNWINDING_SECONDS: Final = 5.0
_DEFAULTS: Final = (signal.default_int_handler, signal.SIG_DFL)


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SystemExit on SIGTERM; a signal that the process ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    unwind = _Unwind()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    taken = {number: handler for number, handler in before.items() if handler in _DEFAULTS}
    for number in taken:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


def signal_behind(error: BaseException) -> int | None:
    """Return the exit code of the signal that an error comes from, or None.

    Compiled modules that are interrupted while they load say only that their initialization failed.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            return INTERRUPTED
        if isinstance(cause, SystemExit):
            return TERMINATED
        cause = cause.__cause__ or cause.__context__
    return None


class _Unwind:
    """Takes repeated signals for one: a second exception would end the removal of half-made files half way.

    After a few seconds a signal counts again, for code that has swallowed the first exception.
    """

    def __init__(self) -> None:
        self._deaf_until = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now < self._deaf_until:
            return
        self._deaf_until = now + _UNWINDING_SECONDS
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(TERMINATED)
