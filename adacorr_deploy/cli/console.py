"""What commands show: JSON or a table on standard output, progress on standard error if a person is watching."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from adacorr_deploy.core.errors import OutputError

Advance = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is
Cell = str | int | float | None

_PIPE_COLUMNS = 160  # width of a table that no terminal limits


def show_json(value: Mapping[str, object] | Sequence[Mapping[str, object]]) -> None:
    """Print one JSON document.

    Raises:
        OutputError: If standard output can't be written.
    """
    show_json_text(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))


def show_json_text(document: str) -> None:
    """Print a JSON document that is text already.

    Raises:
        OutputError: If standard output can't be written.
    """
    _emit(document + "\n")


def show_lines(*lines: str) -> None:
    """Print plain lines.

    Raises:
        OutputError: If standard output can't be written.
    """
    _emit("".join(f"{line}\n" for line in lines))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Print a table; a column whose cells are all numbers is aligned at the right.

    Raises:
        OutputError: If standard output can't be written.
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
    console = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
    with console.capture() as captured:
        console.print(table)
    _emit("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def note(text: str) -> None:
    """Say something to a person, beside the results."""
    print(text, file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Advance]:
    """Lend a bar on standard error; where that is no terminal, nothing is shown."""
    if not sys.stderr.isatty():
        yield lambda text, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)


def _cell_text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _emit(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What stays in the buffer would fail again, without a message, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"Standard output can't be written: {error.strerror}. Send it elsewhere.") from error
