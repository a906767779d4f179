"""The installed commands. Each imports its module only here, so that Ctrl-C while that loads is told as at any time."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

from adacorr_deploy.cli.interrupts import INTERRUPTED, signal_behind

_LAST_STREAM: Final = 2


def build() -> NoReturn:
    """Run adacorr-build."""
    with _process():
        from adacorr_deploy.cli.build import main

        main()


def run() -> NoReturn:
    """Run adacorr-run."""
    with _process():
        from adacorr_deploy.cli.run import main

        main()


def validate() -> NoReturn:
    """Run adacorr-validate."""
    with _process():
        from adacorr_deploy.cli.validate import main

        main()


def calibrate() -> NoReturn:
    """Run adacorr-calibrate."""
    with _process():
        from adacorr_deploy.cli.calibrate import main

        main()


def bench() -> NoReturn:
    """Run adacorr-bench."""
    with _process():
        from adacorr_deploy.cli.bench import main

        main()


def serve() -> NoReturn:
    """Run adacorr-serve."""
    with _process():
        from adacorr_deploy.cli.serve import main

        main()


@contextmanager
def _process() -> Iterator[None]:
    """Be a process of its own: with standard streams, without other packages' warnings, and with a quiet end."""
    _open_missing_streams()
    if not sys.warnoptions:  # unless asked for: what concerns a user is an error of ours
        warnings.simplefilter("ignore")
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:  # before the command could see to it
        if signal_behind(error) != INTERRUPTED:
            raise
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the interpreter's end takes moments, and shows where it was torn


def _open_missing_streams() -> None:
    """Open standard streams that the process was started without: files opened later would get their numbers."""
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= _LAST_STREAM:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  as long as the process
