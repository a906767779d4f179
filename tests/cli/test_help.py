"""Invariant: every command's help appears at once and shows how it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import MAINS
from tests.test_import_time import BUILD_TIME_ONLY

HEAVY = (*BUILD_TIME_ONLY, "onnxruntime")


@pytest.mark.parametrize("name", sorted(MAINS))
def test_help_shows_examples_and_loads_nothing_heavy(name: str, tmp_path: Path) -> None:
    script = f"""
import sys
from adacorr_deploy.cli.{name} import main
try:
    main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
print("loaded:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown[-1] == "loaded: []"
    about = "\n".join(shown).partition("╭")[0].split("\n\n")
    assert all(len(line) > 60 for paragraph in about for line in paragraph.strip("\n").split("\n")[:-1])
    assert sum(line.strip().startswith(f"adacorr-{name} ") for line in shown) >= 3
