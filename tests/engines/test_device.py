"""What a device says of itself, and what it leaves behind."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import DeviceLaunch
from tests.engines.conftest import DriverCount

pytestmark = pytest.mark.gpu


def test_a_device_says_what_it_is(device: Device) -> None:
    assert re.fullmatch(r"sm_[0-9]{2,3}", device.compute_capability)
    assert re.fullmatch(r"[0-9]+\.[0-9]", device.driver_version)
    free, total = device.memory_bytes()
    assert 0 < free <= total
    assert str(device) == f"GPU 0 ({device.name})"


@pytest.mark.parametrize("ordinal", [64, -1])
def test_a_gpu_that_is_not_there_is_named(ordinal: int) -> None:
    with pytest.raises(BackendUnavailableError, match=f"There is no GPU {ordinal}: this process sees [0-9]+"):
        Device.open(ordinal)


def test_too_large_a_buffer_says_how_much_is_free(device: Device) -> None:
    with pytest.raises(EngineError, match=r"takes 268,435,456\.0 MiB, free are .* Sample fewer images") as caught:
        device.allocate((1 << 26, 1 << 20), DType.FLOAT32)
    assert "CUDA_ERROR_OUT_OF_MEMORY" in str(caught.value)
    small = device.allocate((2,), DType.FLOAT32)
    small.write(np.ones(2, dtype=np.float32))
    np.testing.assert_array_equal(small.read(), np.ones(2))


def test_reads_are_counted_as_waits(device: Device) -> None:
    buffer = device.allocate((2,), DType.FLOAT32)
    buffer.read()
    device.synchronize()
    assert (device.synchronisations, device.event_waits) == (2, 0)


def test_closing_frees_everything(driver_count: DriverCount) -> None:
    device = Device.open()
    buffer = device.allocate((100,), DType.FLOAT32)
    view = buffer[10:20]
    for _ in range(3):
        buffer.write(np.zeros(100, dtype=np.float32))
    late = buffer.read_later()
    launch = DeviceLaunch(device, "copy", lambda stream: None, on_run=lambda: None, keeps=(view,))
    device.close()
    device.close()
    assert (driver_count("live_allocations"), driver_count("live_pinned")) == (0, 1)
    np.testing.assert_array_equal(late(), np.zeros(100))
    assert driver_count("live_pinned") == 0
    del device, buffer, view, late, launch
    gc.collect()
    for kind in ("allocations", "pinned", "streams", "events", "pools", "graphs", "executables", "user_objects"):
        assert driver_count(f"live_{kind}") == 0, kind


def test_forgetting_frees_as_closing_does(driver_count: DriverCount) -> None:
    device = Device.open()
    buffer = device.allocate((100,), DType.FLOAT32)
    buffer.write(np.ones(100, dtype=np.float32))
    buffer.read()
    del device, buffer
    gc.collect()
    for kind in ("allocations", "pinned", "streams", "events", "pools"):
        assert driver_count(f"live_{kind}") == 0, kind


def test_what_is_closed_is_refused() -> None:
    device = Device.open()
    buffer = device.allocate((2,), DType.FLOAT32)
    launch = DeviceLaunch(device, "part", lambda stream: None, on_run=lambda: None, keeps=(buffer,))
    device.close()
    for use in (launch.run, buffer.read, lambda: buffer.write(np.zeros(2, dtype=np.float32)), device.synchronize):
        with pytest.raises(EngineError, match="was closed"):
            use()
    with pytest.raises(EngineError, match="was closed"):
        device.allocate((2,), DType.FLOAT32)


def test_devices_of_one_gpu_live_side_by_side(device: Device) -> None:
    with Device.open() as second:
        ours, theirs = device.allocate((3,), DType.FLOAT32), second.allocate((3,), DType.FLOAT32)
        ours.write(np.ones(3, dtype=np.float32))
        theirs.write(np.full(3, 2, dtype=np.float32))
        np.testing.assert_array_equal(theirs.read(), np.full(3, 2))
    np.testing.assert_array_equal(ours.read(), np.ones(3))
    assert (device.synchronisations, second.synchronisations) == (1, 2)
