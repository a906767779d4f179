"""The kernels' benchmark: its check passes on the stand-in driver, and without a GPU it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.stand_in import run_on_stand_in
from tests.plugins.host_kernels import needs_compiler

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "kernels.py"
BLOCK_KERNELS = {"signals", "predict_1", "blend_3_u4", "combine_2", "modulated_u1", "probe"}
KERNELS = BLOCK_KERNELS | {"extrapolate_2", "output_error", "philox_normal"}


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")


@pytest.mark.slow
@needs_compiler
def test_its_check_finds_every_kernel_right_on_the_stand_in(tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    results = tmp_path / "kernels.json"
    done = run_on_stand_in(str(SCRIPT), "--check-only", "--json", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(results.read_text())["checks"]
    assert {check["part"] for check in checks} >= KERNELS
    assert {check["precision"] for check in checks} == {"float32", "float16", "bfloat16"}
    assert all(check["error"] <= 1 and check["repeats"] for check in checks)
    assert {check["aligned"] for check in checks} == {True, False}
