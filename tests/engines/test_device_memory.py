"""A device buffer behaves as an array of the host does, whatever is queued, and nothing but a read waits."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_memory import DeviceBuffer, device_buffer
from adacorr_deploy.engines.host_memory import HostBuffer
from adacorr_deploy.engines.pinned_memory import CHUNK_BYTES
from tests.engines.conftest import DriverCount

pytestmark = pytest.mark.gpu


def _numbers(shape: tuple[int, ...], dtype: DType = DType.FLOAT32, *, start: int = 1) -> NDArray[np.generic]:
    return (np.arange(start, start + np.prod(shape, dtype=int)) % 97).reshape(shape).astype(dtype.numpy)


@pytest.mark.parametrize("dtype", list(DType))
def test_a_fresh_buffer_is_zero_and_aligned(device: Device, dtype: DType) -> None:
    buffer = device.allocate((5, 3), dtype)
    assert buffer.address % 256 == 0
    values = buffer.read()
    assert values.dtype == dtype.numpy and values.shape == (5, 3) and not values.astype(np.float32).any()


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(7,), (2, 3, 5), (), (0, 4)])
def test_what_is_written_is_read(device: Device, dtype: DType, shape: tuple[int, ...]) -> None:
    buffer = device.allocate(shape, dtype)
    values = _numbers(shape, dtype)
    buffer.write(values)
    read = buffer.read()
    assert read.dtype == values.dtype and read.shape == shape
    np.testing.assert_array_equal(read.astype(np.float64), values.astype(np.float64))


def test_a_transposed_array_is_written_as_it_reads(device: Device) -> None:
    buffer = device.allocate((3, 4), DType.FLOAT32)
    values = _numbers((4, 3)).T
    buffer.write(values)
    np.testing.assert_array_equal(buffer.read(), values)


def test_a_write_longer_than_a_pinned_block_arrives_whole(device: Device) -> None:
    count = CHUNK_BYTES // 4 * 3 + 5
    buffer = device.allocate((count,), DType.FLOAT32)
    values = np.arange(count, dtype=np.float32)
    buffer.write(values)
    np.testing.assert_array_equal(buffer.read(), values)


def test_the_callers_array_is_its_own_after_a_write(device: Device) -> None:
    buffer = device.allocate((4,), DType.FLOAT32)
    values = np.ones(4, dtype=np.float32)
    buffer.write(values)
    values[:] = 7
    np.testing.assert_array_equal(buffer.read(), np.ones(4))


def test_writes_copies_and_late_reads_do_not_wait(device: Device) -> None:
    one, other = device.allocate((64,), DType.FLOAT32), device.allocate((64,), DType.FLOAT32)
    late = []
    for start in range(200):
        one.write(_numbers((64,), start=start))
        other.copy_from(one)
        late.append(other.read_later())
    assert (device.synchronisations, device.event_waits) == (0, 0)
    for start, values in enumerate(late):
        np.testing.assert_array_equal(values(), _numbers((64,), start=start))
    assert (device.synchronisations, device.event_waits) == (0, 200)


def test_endless_writing_pins_no_endless_memory(device: Device, driver_count: DriverCount) -> None:
    rows = device.allocate((100, 1 << 18), DType.FLOAT32)  # of 1 MiB
    for row in range(100):
        rows[row].write(np.full(1 << 18, row, dtype=np.float32))
    assert driver_count("live_pinned") <= 34
    np.testing.assert_array_equal(rows.read(), np.repeat(np.arange(100.0), 1 << 18).reshape(100, -1))


def test_a_view_shares_its_memory(device: Device) -> None:
    whole = device.allocate((4, 2, 3), DType.FLOAT16)
    whole.write(_numbers((4, 2, 3), DType.FLOAT16))
    expected = _numbers((4, 2, 3), DType.FLOAT16)
    np.testing.assert_array_equal(whole[1:3][-1].read(), expected[1:3][-1])
    assert whole[2].address == whole.address + 2 * 6 * 2
    whole[1:3][0].write(np.zeros((2, 3), dtype=np.float16))
    expected[1] = 0
    np.testing.assert_array_equal(whole.read(), expected)
    assert whole[4:].shape == (0, 2, 3)


def test_a_view_keeps_the_memory(device: Device, driver_count: DriverCount) -> None:
    view = device.allocate((4, 3), DType.FLOAT32)[2]
    gc.collect()
    view.write(_numbers((3,)))
    np.testing.assert_array_equal(view.read(), _numbers((3,)))
    assert driver_count("live_allocations") == 1
    del view
    assert driver_count("live_allocations") == 0


@pytest.mark.parametrize("index", [4, -5, slice(0, 4, 2), slice(None, None, -1)])
def test_a_view_outside_or_with_gaps_is_refused(device: Device, index: int | slice) -> None:
    with pytest.raises(EngineError, match=r"first axis|outside"):
        device.allocate((4, 3), DType.FLOAT32)[index]


@pytest.mark.parametrize(
    "values", [np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64), np.zeros(6, np.float32)]
)
def test_nothing_is_cast_or_reshaped(device: Device, values: NDArray[np.generic]) -> None:
    buffer = device.allocate((2, 3), DType.FLOAT32)
    with pytest.raises(EngineError, match="Cast and reshape"):
        buffer.write(values)


def test_a_copy_takes_equal_buffers_of_the_same_device_only(device: Device) -> None:
    buffer = device.allocate((2, 3), DType.FLOAT32)
    for other in (device.allocate((3, 2), DType.FLOAT32), device.allocate((2, 3), DType.INT64)):
        with pytest.raises(EngineError, match="can't take one of shape"):
            buffer.copy_from(other)
    with pytest.raises(EngineError, match="got a HostBuffer"):
        buffer.copy_from(HostBuffer.allocate((2, 3), DType.FLOAT32))
    with Device.open() as second, pytest.raises(EngineError, match="Allocate it with that backend"):
        buffer.copy_from(second.allocate((2, 3), DType.FLOAT32))
    assert device_buffer(buffer, device) is buffer


def test_a_late_read_gives_what_stood_there_when_it_was_asked_for(device: Device) -> None:
    buffer = device.allocate((3,), DType.FLOAT32)
    buffer.write(_numbers((3,)))
    late = buffer.read_later()
    buffer.write(_numbers((3,), start=50))
    np.testing.assert_array_equal(buffer.read(), _numbers((3,), start=50))
    first = late()
    np.testing.assert_array_equal(first, _numbers((3,)))
    assert late() is first and device.event_waits == 1


def test_a_late_read_outlives_its_buffer(device: Device) -> None:
    buffer = device.allocate((3,), DType.FLOAT32)
    buffer.write(_numbers((3,)))
    late = buffer.read_later()
    del buffer
    np.testing.assert_array_equal(late(), _numbers((3,)))


def test_a_late_read_that_nobody_asks_for_spoils_no_later_write(device: Device) -> None:
    buffer, other = device.allocate((1000,), DType.FLOAT32), device.allocate((1000,), DType.FLOAT32)
    buffer.write(_numbers((1000,)))
    buffer.read_later()
    other.write(_numbers((1000,), start=5))
    np.testing.assert_array_equal(other.read(), _numbers((1000,), start=5))


def test_late_reads_that_nobody_asks_for_cost_no_memory(device: Device, driver_count: DriverCount) -> None:
    buffer = device.allocate((1000,), DType.FLOAT32)
    for _ in range(3):
        for start in range(10):
            buffer.write(_numbers((1000,), start=start))
            buffer.read_later()
        device.synchronize()
    assert driver_count("live_pinned") <= 20


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "copy", "late", "read", "again"]), st.integers(0, 2), st.integers(0, 3)),
        max_size=25,
    )
)
def test_any_sequence_of_operations_is_that_of_arrays(device: Device, operations: list[tuple[str, int, int]]) -> None:
    buffers = [device.allocate((4, 3), DType.FLOAT32) for _ in range(3)]
    arrays = [np.zeros((4, 3), dtype=np.float32) for _ in range(3)]
    late: list[tuple[Callable[[], NDArray[np.generic]], NDArray[np.float32]]] = []

    def view(index: int, row: int) -> tuple[DeviceBuffer, NDArray[np.float32]]:
        return buffers[index][row], arrays[index][row]

    for time, (operation, index, row) in enumerate(operations, start=1):
        buffer, array = view(index, row)
        if operation == "write":
            array[:] = time
            buffer.write(array)
        elif operation == "copy":
            source, values = view((index + 1) % 3, (row + time) % 4)
            array[:] = values
            buffer.copy_from(source)
        elif operation == "late":
            late.append((buffer.read_later(), array.copy()))
        elif operation == "read":
            np.testing.assert_array_equal(buffer.read(), array)
        elif late:
            values_of, expected = late.pop(row % len(late))
            np.testing.assert_array_equal(values_of(), expected)
    for values_of, expected in reversed(late):
        np.testing.assert_array_equal(values_of(), expected)
    for buffer, array in zip(buffers, arrays, strict=True):
        np.testing.assert_array_equal(buffer.read(), array)
