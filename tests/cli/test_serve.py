"""adacorr-serve: one command from a bundle to a repository, and mistakes answered with one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command


def test_a_bundle_becomes_a_repository(command: Command, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    shown = command("serve", bundle, "-o", output, "--name", "tiny", "--fast", "fora@4", "--json").json
    assert shown["model"] == "tiny"
    assert shown["quality"] == {"exact": "none", "balanced": "robust", "fast": "fora@4"}
    assert (output / "tiny" / "configs" / "cpu.pbtxt").is_file()
    assert "exists" in command("serve", bundle, "-o", output).error
    assert command("serve", bundle, "-o", output, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-rows", "1,x"], "is not a list of whole numbers"),
        (["--batch-rows", "4,2"], "each larger than the one before"),
        (["--balanced", "quick"], "neither a preset"),
        (["--policy-file", "missing.toml"], "missing.toml can't be read"),
        (["--max-queue", "0"], "--max-queue"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    command: Command, bundle: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in command("serve", bundle, "-o", tmp_path / "models", *options).error
    assert not (tmp_path / "models").exists()


def test_without_a_server_run_says_how_to_get_one(
    command: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADACORR_TRITON", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "tools/serving/install_triton.sh" in command("serve", bundle, "-o", tmp_path / "models", "--run").error
    assert not (tmp_path / "models").exists()


def test_what_run_shows_to_ask_is_what_the_model_takes(
    command: Command, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server: only what is said before it starts, of a model with three classes."""
    monkeypatch.setattr("adacorr_deploy.serving.local_server.installed_triton", object)
    monkeypatch.setattr("adacorr_deploy.serving.local_server.run_server", lambda server, repository, ports: 0)
    output = tmp_path / "my models"
    outcome = command("serve", bundle, "-o", output, "--run", "--http-port", 9000, "--max-images", 2)
    assert outcome.code == 0
    assert f"python '{output}/client.py' --server localhost:9001 0 2\n" in outcome.stderr
