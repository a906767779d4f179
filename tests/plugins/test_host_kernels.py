"""The CPU's stand-in for a GPU: it has every kernel, its number formats are IEEE's, and it finds faults."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from adacorr_deploy.plugins.decision_kernels import DECIDE_KERNEL, NOTE_KERNEL
from adacorr_deploy.plugins.kernels import ELEMENT_BYTES, KERNELS
from tests.plugins.host_kernels import FLOAT32, GuardedBuffer, encoded, host_kernels, needs_compiler

pytestmark = needs_compiler


def test_number_formats_of_the_stand_in_are_ieee() -> None:
    library, every = host_kernels(), np.arange(65536, dtype=np.uint16)
    halves = every.view(np.float16).astype(np.float32)
    found = np.array([library.half_to_float(int(bits)) for bits in every], np.float32)
    np.testing.assert_array_equal(found, halves)
    values = np.random.default_rng(0).integers(0, 2**32, 20000, np.uint64).astype(np.uint32).view(np.float32)
    small = np.random.default_rng(1).standard_normal(5000).astype(np.float32) * np.float32(1e-6)
    values = np.concatenate([values[np.isfinite(values)], small, [65519.9, 65520.0, 0.0, -0.0, 2.0**-25, 3 * 2.0**-26]])
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32).astype(np.float16).view(np.uint16)
    assert [library.float_to_half(float(value)) for value in values] == rounded.tolist()
    assert [library.float_to_bfloat(float(value)) for value in values] == encoded(values, "bfloat16").tolist()


def test_it_has_every_kernel_with_the_arguments_of_its_spec() -> None:
    expected = {
        kernel.entry(precision): len(kernel.inputs) + len(kernel.sizes) + len(kernel.outputs) + bool(kernel.scratch)
        for kernel in KERNELS.values()
        for precision in ELEMENT_BYTES
    }
    expected |= {DECIDE_KERNEL: 12, NOTE_KERNEL: 3}
    names = [name for name in host_kernels().names if name.startswith("adacorr_")]
    assert {name: host_kernels().argument_count(name) for name in names} == expected


def faulty(name: str, *, threads: int = 64, seed: int = 0) -> GuardedBuffer:
    values = GuardedBuffer(threads * FLOAT32.itemsize)
    values.bytes.view(np.float32)[:] = np.arange(threads)
    host_kernels().run_kernel(name, (1, 1, 1), (threads, 1, 1), 0, [ctypes.c_void_p(values.address)], seed=seed)
    return values


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("faulty_barrier", "threads of a block part at a barrier"),
        ("faulty_shuffle", "lanes of a warp part at a shuffle"),
        ("faulty_read", "memory is accessed that it may not"),
        ("faulty_nothing", "there is no kernel of that name"),
    ],
)
def test_what_would_hang_a_gpu_is_refused_and_the_next_launch_works(name: str, why: str) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{name}: {why}"):
            faulty(name)
    faulty("faulty_race").check("values")


def test_a_write_before_the_start_is_found() -> None:
    with pytest.raises(AssertionError, match="values: written outside its buffer"):
        faulty("faulty_write").check("values")


def test_a_missing_barrier_shows_in_some_order() -> None:
    results = {faulty("faulty_race", threads=256, seed=seed).bytes.tobytes() for seed in range(8)}
    assert len(results) > 1


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 1, 1), (33, 1, 1)), ((1, 1, 1), (2048, 1, 1)), ((1, 65536, 1), (32, 1, 1))]
)
def test_sizes_that_no_gpu_takes_are_refused(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"a block is|the grid's size"):
        host_kernels().run_kernel("faulty_race", grid, block, 0, [ctypes.c_void_p(0)])
