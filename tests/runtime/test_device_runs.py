"""Starts the tests that need a GPU's stream on the stand-in for NVIDIA's driver."""

from __future__ import annotations

import pytest

from tests.engines.stand_in import run_on_stand_in
from tests.plugins.host_kernels import needs_compiler

_TESTS = ("tests/runtime/test_device_pipeline.py", "tests/runtime/test_decided_on_device.py")


@needs_compiler
@pytest.mark.parametrize("eager", ["0", "1"], ids=["as late as possible", "as early as possible"])
def test_the_loop_is_right_whenever_the_gpu_works(eager: str) -> None:
    result = run_on_stand_in("-m", "pytest", "-q", "-p", "no:cacheprovider", *_TESTS, STAND_IN_EAGER=eager)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    assert "skipped" not in result.stdout.splitlines()[-1]
