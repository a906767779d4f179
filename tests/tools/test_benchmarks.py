"""The benchmarks run on a tiny model from a fresh process, and print what their readers rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
pytest.importorskip("torch")

FIGURES = {
    "chain ÷ monolith",
    "chain ÷ diffusers",
    "reused block ÷ evaluated block",
    "signals of a block ÷ evaluated block",
    "extrapolated step ÷ evaluated step",
    "share of blocks in uncached time",
    "bookkeeping ÷ uncached time",
    "signals and bookkeeping ÷ uncached time",
    *(
        f"{figure}, {run}"
        for figure in ("speed-up", "efficiency", "efficiency of the loop")
        for run in ("whole steps, output-taylor", "blocks, gated-taylor")
    ),
}


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_both_measure_a_tiny_model_and_their_arithmetic_holds(tmp_path: Path) -> None:
    bundle = tmp_path / "tiny.bundle"
    arguments = ("--size", "tiny", "--batch", 2, "--rounds", 1, "--steps", 6, "--keep", bundle, "--json")
    chain = json.loads(run_script("chain.py", *arguments))
    assert chain["rho"] == {"none": 0.0, "output": 0.5, "blocks": 0.5}
    assert chain["max_abs_difference_to_chain"]["monolith"] < 1e-4  # every arm computes the same step
    assert chain["max_abs_difference_to_chain"]["diffusers"] < 1e-3
    assert {figure["name"] for figure in chain["figures"]} == FIGURES
    assert all(figure["low"] <= figure["median"] <= figure["high"] for figure in chain["figures"])
    assert {"cpu", "cores", "torch", "diffusers", "onnxruntime", "load_average"} <= chain["machine"].keys()

    memory = json.loads(run_script("memory.py", bundle, "--batch", 2, "--steps", 6, "--json"))
    assert [row["policy"] for row in memory["rows"]] == ["none", "robust", "blocks"]
    for row in memory["rows"]:
        assert row["buffers"] == row["allocated"]  # the formulas say exactly what the runtime asks for
        assert row["arithmetic"] == sum(term["size_bytes"] for term in row["terms"])
        assert row["baseline"] < row["peak_when_opened"] <= row["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DiT-tiny", "PixArt-tiny"])
def test_the_memory_of_a_build_is_measured_beside_its_weights_and_held_to_a_limit(model: str) -> None:
    memory = json.loads(run_script("build_memory.py", model, "--limit", 100_000, "--json"))
    weights = min(memory["checkpoint"], memory["bundle"])
    assert 0 < weights < memory["baseline"] < memory["peak"]  # of so small a model, the imports are all there is
    assert memory["ratio"] == memory["peak"] / weights
    command = [sys.executable, str(BENCHMARKS / "build_memory.py"), model, "--limit", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "times the weights, allowed is 1." in done.stderr


@pytest.mark.slow
def test_spans_and_halves_of_a_tiny_model_are_measured_on_the_same_numbers() -> None:
    report = json.loads(run_script("spans.py", "--size", "tiny", "--batch", 2, "--rounds", 1, "--json"))
    assert report["halves_max_abs_difference"] < 1e-4
    assert {"chain of halves ÷ chain of blocks", "range reused, held ÷ evaluated", "residual kept ÷ evaluated"} <= {
        figure["name"] for figure in report["figures"]
    }
    assert all(0 < figure["low"] <= figure["median"] <= figure["high"] for figure in report["figures"])


def test_an_unknown_size_is_refused_by_name() -> None:
    command = [sys.executable, str(BENCHMARKS / "chain.py"), "--size", "M/2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "size 'M/2' is not known" in done.stderr
