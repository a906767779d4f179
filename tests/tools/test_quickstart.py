"""The quickstart runs the installed commands and reads what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_policy_that_it_compares_is_a_preset(quickstart: ModuleType) -> None:
    presets = {row["name"] for row in quickstart.command("bench", "--list")}
    assert {name.partition("@")[0] for name in quickstart.POLICIES.split(",")} <= presets


@pytest.mark.parametrize("name", ["build", "run", "validate", "calibrate", "bench"])
def test_a_command_that_fails_ends_it_with_the_same_code(quickstart: ModuleType, name: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        quickstart.command(name, "no-such-bundle", "--no-such-option")
    assert stopped.value.code == 2
