"""An advisory lock on a folder: it keeps two commands apart, ends with its process, and leaves no file behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, and say whether it is held.

    It isn't where the folder is missing, or where the platform or the file system knows no such locks. There, a caller
    may go on with what hardly ever meets another process, but not remove what one may be using.

    Args:
        folder: Need not be writable.
        wait: For whoever holds it now; otherwise False is given at once.
    """
    with ExitStack() as resources:
        held = False
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            resources.callback(os.close, descriptor)  # which frees the lock
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
