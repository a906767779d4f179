"""From what a command raises to its exit code: one line for what a user can act on, a traceback for our own bugs."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn, cast

import typer

from adacorr_deploy.core.errors import AdaCorrError, BackendUnavailableError

FAILED: Final = 2  # bad input, or a result that can't be written
INTERRUPTED: Final = 130  # as a shell says of a command that Ctrl-C ended
TERMINATED: Final = 143

# Typer may bring its own copy of click: its error is found by way of what Typer exports.
_UsageError: Final = cast("type[Exception]", typer.BadParameter.__bases__[0])

_BUILD_PACKAGES: Final = frozenset(
    {"diffusers", "onnx", "onnx_ir", "onnxscript", "polygraphy", "safetensors", "torch", "torchmetrics"}
)


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, its own code, 2 after one `error:` line, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        app: With a single command, whose result is its exit code (None for 0).
        arguments: In place of the process's own.
    """
    with _sigterm_unwinds():
        sys.exit(_exit_code(app, arguments))


def _exit_code(app: typer.Typer, arguments: Sequence[str] | None) -> int:
    try:
        code: object = app(args=arguments, standalone_mode=False)
    except _UsageError as error:
        message: str = getattr(error, "format_message", error.__str__)()
        return _fail(f"{message.rstrip('.')}. See: {_command_name(error)} --help")
    except AdaCorrError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED  # what Typer returns for it nowadays
    if code == INTERRUPTED:
        typer.echo("interrupted", err=True)
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return FAILED


def _command_name(error: Exception) -> str:
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


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that half-made files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)
