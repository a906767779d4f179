"""Invariant: a command is told of by its own words alone, from its first import to the end of its process."""

from __future__ import annotations

import pytest

from tests.cli.conftest import MAINS
from tests.cli.processes import command_line, ended

INTERRUPT = "signal.raise_signal(signal.SIGINT)"
INTERRUPTED_IMPORT = f"""
import sys
class Interrupting:
    def find_spec(self, name, *rest):
        if name == "{{module}}":
            try:
                {INTERRUPT}
            except KeyboardInterrupt as error:
                {{reaction}}
sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize("module", ["typer", "numpy", "adacorr_deploy.runtime"])
@pytest.mark.parametrize("reaction", ["raise", "raise ImportError('initialization failed') from error"])
def test_ctrl_c_during_an_import_is_one_line(module: str, reaction: str) -> None:
    before = INTERRUPTED_IMPORT.format(module=module, reaction=reaction)
    found = ended(command_line("run", "nowhere", "-o", "out", before=before))
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "interrupted\n")


def test_another_error_during_an_import_is_a_bug() -> None:
    before = INTERRUPTED_IMPORT.format(module="typer", reaction="pass\n            raise ImportError('a bug')")
    found = ended(command_line("run", "nowhere", "-o", "out", before=before))
    assert found.returncode == 1
    assert found.stderr.endswith("ImportError: a bug\n")


def test_ctrl_c_at_the_end_changes_nothing() -> None:
    before = f"import atexit; atexit.register(lambda: {INTERRUPT})"
    found = ended(command_line("run", "nowhere", "-o", "out", before=before))
    assert found.returncode == 2
    assert [line[:7] for line in found.stderr.splitlines()] == ["error: "]


@pytest.mark.parametrize(("asked", "shown"), [("pass", False), ("sys.warnoptions.append('default')", True)])
def test_warnings_are_shown_to_those_who_ask(asked: str, shown: bool) -> None:
    before = f"import atexit, sys, warnings; {asked}; atexit.register(lambda: warnings.warn('of a package'))"
    found = ended(command_line("bench", "--list", before=before))
    assert found.returncode == 0
    assert ("of a package" in found.stderr) == shown


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    before = (
        "import atexit, os; os.closerange(0, 3); atexit.register(lambda: os._exit(os.open(os.devnull, os.O_RDONLY)))"
    )
    assert ended(command_line("run", "nowhere", "-o", "out", before=before)).returncode > 2


@pytest.mark.parametrize("name", sorted(MAINS))
def test_every_command_is_there(name: str) -> None:
    found = ended(command_line(name, "--help"))
    assert found.returncode == 0
    assert f"adacorr-{name} " in found.stdout
