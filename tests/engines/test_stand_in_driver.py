"""The GPU runtime's tests, run on the stand-in for NVIDIA's driver; and that the stand-in catches what it should."""

from __future__ import annotations

import pytest

from tests.engines.stand_in import run_on_stand_in
from tests.plugins.host_kernels import needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.timeout(600),
]
_TESTS = (
    "test_device.py",
    "test_device_decisions.py",
    "test_device_launch.py",
    "test_device_memory.py",
    "test_kernel_session.py",
    "test_onnxruntime_cuda.py",
    "test_tensorrt_session.py",
)
_OPEN = """
import ctypes
import numpy as np
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.device import Device
device = Device.open()
buffer = device.allocate((100,), DType.FLOAT32)
"""


@pytest.mark.parametrize("eager", ["0", "1"], ids=["as late as possible", "as early as possible"])
def test_the_runtime_is_right_whenever_the_gpu_works(eager: str) -> None:
    tests = [f"tests/engines/{name}" for name in _TESTS]
    result = run_on_stand_in("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, STAND_IN_EAGER=eager)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    assert "skipped" not in result.stdout.splitlines()[-1]


def _run(script: str, **settings: str) -> tuple[int, str]:
    result = run_on_stand_in("-c", _OPEN + script, **settings)
    return result.returncode, result.stdout + result.stderr


def test_a_host_that_touches_device_memory_is_caught() -> None:
    status, output = _run("device.synchronize(); ctypes.string_at(buffer.address, 4)")
    assert status < 0 and "the host touches device memory" in output


def test_a_copy_past_a_buffer_is_caught() -> None:
    status, output = _run("device.copy(buffer.address + 4, buffer.address, 400)")
    assert status == 1 and "leaves what is allocated" in output


def test_work_on_freed_memory_fails_the_next_wait() -> None:
    script = """
block = device.pinned.take(400)
device.copy(buffer.address, block.address, 400)
block.memory.close()
for wait in (device.synchronize, buffer.read_later()):
    try:
        wait()
    except EngineError as error:
        print("failed:", error)
"""
    status, output = _run(script)
    assert status == 0, output
    assert output.count("failed: The GPU's work failed on GPU 0 (stand-in): CUDA_ERROR_ILLEGAL_ADDRESS") == 2


def test_nothing_runs_before_somebody_waits() -> None:
    script = """
count = ctypes.CDLL("libcuda.so.1").stand_in_count
buffer.write(np.ones(100, dtype=np.float32))
print("before", count(b"operations"))
device.synchronize()
print("after", count(b"operations"))
"""
    status, output = _run(script)
    assert status == 0 and output.splitlines()[-2:] == ["before 0", "after 2"], output


def test_a_function_that_is_not_there_says_its_name() -> None:
    status, output = _run('device.cuda.call("cuMemAllocManaged", 4, 1)')
    assert status == 1 and "cuMemAllocManaged is not in the stand-in driver" in output


def test_a_machine_with_a_driver_and_no_gpu_is_told_so() -> None:
    status, output = _run("", STAND_IN_DEVICES="0")
    assert status == 1 and "No GPU can be used here (cuInit failed: CUDA_ERROR_NO_DEVICE)" in output


def test_a_driver_without_switches_in_graphs_is_told_to_be_updated() -> None:
    script = """
from adacorr_deploy.engines.device_decisions import DeviceDecisions
DeviceDecisions(device, b"")
"""
    status, output = _run(script, STAND_IN_DRIVER_VERSION="12070")
    expected = "has a driver for CUDA 12.7, and graphs that decide need one for 12.8 or later. Update the driver."
    assert status == 1 and expected in output


_SWITCH = """
device.synchronize()
from adacorr_deploy.engines.cuda_core import load_cuda
builder = device.graph_builder()
builder.begin_building("thread_local")
device.cuda.call("cuMemcpyAsync", buffer.address, buffer.address + 200, 4, builder.stream.handle)
condition = builder.create_condition(default_value=DEFAULT)
bodies = builder.switch(condition, 1)
bodies[0].begin_building("thread_local")
device.cuda.call("cuMemcpyAsync", buffer.address, buffer.address + 200, 4, bodies[0].stream.handle)
bodies[0].end_building()
builder.end_building()
count = ctypes.CDLL("libcuda.so.1").stand_in_count
builder.complete().launch(device.stream)
before = count(b"operations")
try:
    device.synchronize()
finally:
    print("operations", count(b"operations") - before)
"""


@pytest.mark.parametrize(("default", "operations"), [("0", 3), ("1", 2), ("77", 2)])
def test_a_switch_runs_the_case_of_its_default_or_none(default: str, operations: int) -> None:
    status, output = _run(_SWITCH.replace("DEFAULT", default))
    assert status == 0 and f"operations {operations}" in output, output


def test_a_condition_that_nothing_sets_fails_the_launch() -> None:
    status, output = _run(_SWITCH.replace("default_value=DEFAULT", ""))
    assert status == 1 and "a conditional node runs before anything has set its condition" in output


def test_a_condition_serves_one_node() -> None:
    again = "bodies = builder.switch(condition, 1)\n"
    status, output = _run(_SWITCH.replace("DEFAULT", "0").replace(again, again * 2))
    assert status == 1 and "with a new condition of that graph" in output
