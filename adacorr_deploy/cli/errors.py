"""From what a command raises to its exit code: one line for what a user can act on, a traceback for our own bugs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn, cast

import typer

from adacorr_deploy.cli.console import held_output, readable, say
from adacorr_deploy.cli.interrupts import INTERRUPTED, signal_behind, signals_unwind
from adacorr_deploy.core.errors import AdaCorrError, BackendUnavailableError

FAILED: Final = 2  # bad input, or a result that can't be written

# Characters. Messages hold what users and files gave, which may be of any length.
_WORD: Final = 200
_LINE: Final = 600

# Typer may bring its own copy of click: its error is found by way of what Typer exports.
_UsageError: Final = cast("type[Exception]", typer.BadParameter.__bases__[0])

_BUILD_PACKAGES: Final = frozenset(
    {
        "diffusers",
        "jinja2",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "polygraphy",
        "safetensors",
        "sentencepiece",
        "torch",
        "torchmetrics",
        "transformers",
    }
)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, its own code, 2 after one `error:` line, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        app: With a single command, whose result is its exit code (None for 0).
        arguments: In place of the process's own.
    """
    with signals_unwind():
        sys.exit(_exit_code(app, arguments))


def _exit_code(app: typer.Typer, arguments: Sequence[str] | None) -> int:
    try:
        with held_output():
            code: object = app(args=arguments, standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = signal_behind(error)
        if code is None:
            message = _message(error)
            if message is None:
                raise
            say(f"error: {_one_line(message)}")
            return FAILED
    if code == INTERRUPTED:  # what Typer returns for it nowadays, too
        say("interrupted")
    return code if isinstance(code, int) else 0


def _message(error: BaseException) -> str | None:
    """Return what to tell a user who can act on it; None for a bug of ours."""
    match error:
        case _UsageError():
            usage: str = getattr(error, "format_message", error.__str__)()
            return f"{usage.rstrip('.')}. See: {_command_name(error)} --help"
        case AdaCorrError():
            return str(error)
        case MemoryError():
            return f"Not enough memory: {error}. Take fewer images at a time, or a machine that has more."
        case _:
            return None


def _one_line(message: str) -> str:
    """Return a message without what an input could do to a terminal: more lines, escapes, endless words."""
    return _clipped(" ".join(readable(_clipped(word, _WORD)) for word in message.split()), _LINE)


def _clipped(text: str, limit: int) -> str:
    """Cut the middle out of a long text: what happened stands at the beginning, what to do next at the end."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}"


def _command_name(error: BaseException) -> str:
    context: typer.Context | None = getattr(error, "ctx", None)
    return context.command_path if context is not None else "the command"


@contextmanager
def needs_build_packages(what: str) -> Iterator[None]:
    """Turn a missing build package into an error that says how to install it.

    Raises:
        BackendUnavailableError: If PyTorch or another package that only builds need is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _BUILD_PACKAGES:
            raise
        raise BackendUnavailableError(
            f"{what} needs the package {package}, which is not installed. "
            "Install it with: pip install 'adacorr-deploy[build,cpu]'"
        ) from error
