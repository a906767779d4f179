"""What commands show: JSON or a table on standard output, progress on standard error if a person is watching."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Final, TextIO

from adacorr_deploy.core.errors import OutputError

Advance = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
Cell = str | int | float | None

READER_GONE: Final = 141  # as a shell says of a command whose reader has closed the pipe

_PIPE_COLUMNS: Final = 160  # width of a table that no terminal limits


@contextmanager
def held_output() -> Iterator[None]:
    """Keep what is printed on standard output until the end, and write it then: whole, or nothing if an error comes.

    Characters that its encoding lacks are written as escapes.

    Raises:
        OutputError: If standard output is closed or can't be written.
        SystemExit: With `READER_GONE`, if nobody reads it any more.
    """
    real: TextIO | None = sys.stdout  # None where the process was started without it
    held = _HeldOutput(real)
    with redirect_stdout(held):
        yield
    if text := held.text():
        _write(text, real)


class _HeldOutput(io.TextIOWrapper):
    """Takes what the real standard output could, and looks like it to what chooses colours and lines by that."""

    def __init__(self, real: TextIO | None) -> None:
        self._bytes = io.BytesIO()
        self._terminal = real is not None and real.isatty()
        encoding = real.encoding if real is not None else None
        super().__init__(self._bytes, encoding=encoding or "utf-8", errors="backslashreplace", newline="")

    def isatty(self) -> bool:
        return self._terminal

    def text(self) -> str:
        self.flush()
        return self._bytes.getvalue().decode(self.encoding)


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None:
        raise OutputError("Standard output can't be written: it is closed. Send it elsewhere.")
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _discard(stream)
        sys.exit(READER_GONE)
    except OSError as error:
        _discard(stream)
        raise OutputError(f"Standard output can't be written: {error.strerror}. Send it elsewhere.") from error


def _discard(stream: TextIO) -> None:
    """Drop what stays in a stream's buffer: it would fail again, without a message, when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    """Say a line to a person, on standard error. Where that can't be written, the exit code alone has to tell."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def readable(text: str) -> str:
    """Return a text from elsewhere in which nothing moves a cursor or changes a colour: such characters as escapes."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def show_json(value: Mapping[str, object] | Sequence[Mapping[str, object]]) -> None:
    """Print one JSON document; in ASCII, so that it is the same document in every encoding."""
    print(json.dumps(value, indent=1, allow_nan=False))


def show_lines(*lines: str) -> None:
    """Print plain lines."""
    for line in lines:
        print(readable(line))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, piped_width: int = _PIPE_COLUMNS) -> None:
    """Print a table; a column whose cells are all numbers is aligned at the right.

    Args:
        columns: Their headings.
        rows: A cell for each column.
        piped_width: Letters in a line where no terminal limits it.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = not any(isinstance(row[index], str) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell_text(cell)) for cell in row))  # Text: no markup in what files and models are called
    console = Console(width=None if sys.stdout.isatty() else piped_width)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


@contextmanager
def progress_bar() -> Iterator[Advance]:
    """Lend a bar on standard error; where that is no terminal, nothing is shown."""
    if not sys.stderr.isatty():
        yield lambda text, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda text, done, total: progress.update(task, description=readable(text), completed=done, total=total)


def _cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else readable(str(cell))
