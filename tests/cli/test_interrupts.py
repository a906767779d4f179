"""Invariant: the first signal unwinds a command; those that follow don't disturb its cleaning up."""

from __future__ import annotations

import signal
import threading

import pytest

from adacorr_deploy.cli import interrupts
from adacorr_deploy.cli.interrupts import INTERRUPTED, TERMINATED, signal_behind, signals_unwind


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=str
)
def test_a_signal_unwinds_once(number: signal.Signals, raised: type[BaseException]) -> None:
    cleaned = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            for again in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(again)
            cleaned.append(True)

    with pytest.raises(raised), signals_unwind():
        command()
    assert cleaned == [True]


def test_a_signal_counts_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_UNWINDING_SECONDS", 0.0)
    with signals_unwind():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)


def test_handlers_are_as_they_were_afterwards_and_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with signals_unwind():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_can_run_a_command() -> None:
    entered = []

    def enter() -> None:
        with signals_unwind():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [signal.SIG_DFL]


def wrapped(cause: BaseException) -> Exception:
    """Return what a compiled module makes of an exception while it loads."""
    try:
        try:
            raise cause
        except BaseException as error:
            raise ImportError("initialization failed") from error
    except ImportError as error:
        return error


def test_the_signal_behind_an_error_is_found() -> None:
    assert signal_behind(KeyboardInterrupt()) == INTERRUPTED
    assert signal_behind(wrapped(KeyboardInterrupt())) == INTERRUPTED
    assert signal_behind(wrapped(wrapped(SystemExit(TERMINATED)))) == TERMINATED
    assert signal_behind(wrapped(ValueError())) is None
