"""Invariant: what a user can act on is one line and exit 2; a bug of ours keeps its traceback."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest
import typer

from adacorr_deploy.cli.errors import needs_build_packages, run_app
from adacorr_deploy.core.errors import AdaCorrError, BackendUnavailableError, RequestError


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def exit_code(command: Callable[[], object]) -> int | str | None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    with pytest.raises(SystemExit) as ended:
        run_app(app, [])
    return ended.value.code


@pytest.mark.parametrize("kind", AdaCorrError.__subclasses__())
def test_our_errors_are_one_line_and_exit_2(kind: type[AdaCorrError], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(kind("steps is 0,\n  allowed are [1, 2]."))) == 2
    assert capsys.readouterr() == ("", "error: steps is 0, allowed are [1, 2].\n")


def test_a_message_is_bounded_and_can_not_move_a_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(raising(RequestError(f"got {'x' * 10_000}\x1b[2J. Next:\r\udcff step.")))
    assert capsys.readouterr().err == f"error: got {'x' * 100}…{'x' * 95}\\x1b[2J. Next: \\udcff step.\n"
    exit_code(raising(RequestError("start " + "\x1b " * 10_000 + "end")))
    shown = capsys.readouterr().err
    assert len(shown) < 700
    assert re.fullmatch(r"error: start (\\x1b )+.*….*(\\x1b )+end\n", shown)


def test_too_little_memory_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(MemoryError("Unable to allocate 4 TiB"))) == 2
    assert capsys.readouterr().err.startswith("error: Not enough memory: Unable to allocate 4 TiB. Take fewer images")


@pytest.mark.parametrize(("code", "result"), [(0, None), (0, 0), (1, 1)])
def test_a_commands_result_is_its_exit_code(code: int, result: int | None) -> None:
    assert exit_code(lambda: result) == code


def test_ctrl_c_is_one_line_and_exit_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_what_ctrl_c_was_turned_into_is_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise BackendUnavailableError("initialization failed") from error

    assert exit_code(command) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_sigterm_unwinds_and_is_as_it_was_afterwards() -> None:
    unwound = []

    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(command) == 143
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a bug"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(raising(error))
    with pytest.raises(type(error)) as raised:
        run_app(app, [])
    assert raised.value is error


def test_a_missing_build_package_says_what_to_install() -> None:
    with (
        pytest.raises(BackendUnavailableError, match=r"adacorr-build needs the package torch.*\[build,cpu\]"),
        needs_build_packages("adacorr-build"),
    ):
        _missing("torch.nn")


@pytest.mark.parametrize("name", ["adacorr_deploy.nowhere", None])
def test_another_missing_module_is_a_bug(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError), needs_build_packages("adacorr-build"):
        _missing(name)


def _missing(name: str | None) -> NoReturn:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_other_errors_pass_through_a_build() -> None:
    with pytest.raises(RequestError), needs_build_packages("adacorr-build"):
        raise RequestError("steps is 0")
