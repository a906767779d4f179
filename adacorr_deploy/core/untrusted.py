"""What others wrote, read with care: regular files of a bounded size, and what is wrong with them in one short line."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from typing import Final, NoReturn

from pydantic import ValidationError

_LONGEST_MESSAGE: Final = 300


def bounded_file(path: Path, *, limit_bytes: int) -> bytes:
    """Return the content of a regular file; a pipe or a device, which may never end, is not opened.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is not a regular file, or holds more than `limit_bytes`.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise ValueError(f"it is larger than {limit_bytes} bytes, which no such file needs")
    return content


def value_from_json(text: str) -> object:
    """Parse JSON as RFC 8259 has it: Python's own reader also takes NaN and Infinity.

    Raises:
        ValueError: If the text is not JSON, or nested too deeply to be read.
    """
    try:
        value: object = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def clipped(value: object, length: int = 80) -> str:
    """Return a value as a message may show it: on one line, and no longer than a few words."""
    brief = Repr()
    brief.maxlevel, brief.maxstring, brief.maxlong, brief.maxother = 2, length, length, length
    try:
        text = brief.repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= length else f"{text[: length - 1]}…"


def first_fault(error: ValidationError) -> str:
    """Return the first field that is not valid, what is allowed and what was given.

    Of several fields that don't go together, the validator's own message says what was given.
    """
    first = error.errors(include_url=False, include_context=False)[0]
    message = re.sub(r"^(Value error|Assertion failed), ", "", first["msg"]).rstrip(".")
    if len(message) > _LONGEST_MESSAGE or not message.isprintable():  # some of pydantic's hold what was given
        message = clipped(message, _LONGEST_MESSAGE)[1:-1]
    if not first["loc"] and first["type"] == "value_error":
        return message
    place = ".".join(str(step) for step in first["loc"])
    given = "" if isinstance(first["input"], Mapping) else f", got {clipped(first['input'])}"
    return f"{clipped(place)[1:-1] or 'top level'}: {message}{given}"  # a file's own keys are in the place too
