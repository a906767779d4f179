"""A host buffer's memory is aligned, zeroed, stays where it is, and is never cast or copied silently."""

from __future__ import annotations

import numpy as np
import pytest

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.host_memory import ALIGNMENT_BYTES, HostBuffer


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7)])
def test_a_new_buffer_is_aligned_and_zero(shape: tuple[int, ...], dtype: DType) -> None:
    buffer = HostBuffer.allocate(shape, dtype)
    assert (buffer.shape, buffer.dtype) == (shape, dtype)
    assert buffer.address % ALIGNMENT_BYTES == 0
    np.testing.assert_array_equal(buffer.read(), np.zeros(shape, dtype.numpy))


def test_views_share_memory_down_to_a_single_number() -> None:
    buffer = HostBuffer.allocate((3, 2), DType.FLOAT32)
    assert buffer[1].address == buffer.address + 2 * 4
    assert buffer[1:].shape == (2, 2)
    buffer[1][-1].write(np.array(7, np.float32))
    buffer[2:].write(np.full((1, 2), 5, np.float32))
    np.testing.assert_array_equal(buffer.read(), [[0, 0], [0, 7], [5, 5]])


def test_read_is_a_copy_and_copy_from_is_one_too() -> None:
    one, other = HostBuffer.allocate((2,), DType.INT64), HostBuffer.allocate((2,), DType.INT64)
    one.write(np.array([1, 2]))
    other.copy_from(one)
    kept = one.read()
    one.write(np.array([8, 9]))
    np.testing.assert_array_equal(kept, [1, 2])
    np.testing.assert_array_equal(other.read(), [1, 2])


@pytest.mark.parametrize("values", [np.zeros((2,), np.float32), np.zeros((1, 3), np.float32), np.zeros((2, 3))])
def test_write_neither_broadcasts_nor_casts(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> None:
    with pytest.raises(EngineError, match=r"shape \(2, 3\), float32 can't take"):
        HostBuffer.allocate((2, 3), DType.FLOAT32).write(values)


def test_views_that_are_not_dense_or_not_there_are_refused() -> None:
    buffer = HostBuffer.allocate((4, 2), DType.FLOAT32)
    with pytest.raises(EngineError, match="dense and row-major"):
        buffer[::2]
    for index in (4, -5):
        with pytest.raises(EngineError, match="outside"):
            buffer[index]
    with pytest.raises(EngineError, match="outside"):
        buffer[0][0][0]


def test_memory_that_no_machine_has_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="Sample fewer images"):
        HostBuffer.allocate((2**40, 2**10), DType.FLOAT32)
