"""Invariant: results are written whole or not at all, in any encoding; where they can't be, it is told."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from adacorr_deploy.cli.console import READER_GONE, held_output, readable, show_json, show_lines, show_table
from tests.cli.processes import command_line, ended

PRINTING = (("bench", "--list"), ("bench", "--list", "--json"), ("run", "--help"))


@pytest.mark.parametrize("arguments", PRINTING)
def test_a_full_standard_output_is_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        found = ended(command_line(*arguments), stdout=full)
    assert found.returncode == 2
    assert found.stderr == "error: Standard output can't be written: No space left on device. Send it elsewhere.\n"


@pytest.mark.parametrize("arguments", PRINTING)
def test_a_closed_standard_output_is_one_line(arguments: tuple[str, ...]) -> None:
    found = ended(command_line(*arguments), at_start=partial(os.close, 1))
    assert found.returncode == 2
    assert found.stderr == "error: Standard output can't be written: it is closed. Send it elsewhere.\n"


@pytest.mark.parametrize("arguments", PRINTING)
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = ended(command_line(*arguments), stdout=writer)
    os.close(writer)
    assert (found.returncode, found.stderr) == (READER_GONE, "")


def test_an_error_that_can_not_be_told_keeps_its_exit_code() -> None:
    with Path("/dev/full").open("w") as full:
        assert ended(command_line("run", "nowhere", "-o", "out"), stderr=full).returncode == 2
    assert ended(command_line("run", "nowhere", "-o", "out"), at_start=partial(os.close, 2)).returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_encoding_can_be_written(encoding: str) -> None:
    for arguments in (("run", "--help"), ("bench", "--list")):
        found = ended(command_line(*arguments), encoding=encoding)
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.isascii() == (encoding != "utf-8")


def test_json_is_the_same_in_every_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"é": "ρ 😀 \udcff"}
    show_json(value)
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert json.loads(shown) == value


def test_nothing_is_written_of_what_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OSError, match="half way"), held_output():
        _fail_half_way()
    assert capsys.readouterr().out == ""


def test_what_a_file_is_called_can_not_move_a_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\r\x00\x9b\u202e\udcff\nb"
    harmless = r"a\x1b[2J\r\x00\x9b\u202e\udcff\nb"
    assert readable(hostile) == harmless
    assert readable("Größe ρ 😀 /tmp/x y") == "Größe ρ 😀 /tmp/x y"
    show_lines(hostile)
    show_table(("name", "count"), [(hostile, 1)])
    shown = capsys.readouterr().out
    assert shown.count(harmless) == 2
    assert all(line.isprintable() for line in shown.split("\n"))


def _fail_half_way() -> None:
    show_lines("the first half")
    raise OSError("half way")
