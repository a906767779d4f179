"""The CUDA kernels on the CPU: host_cuda/ compiled by g++ around the very same .cu files, between guarded buffers."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.plugins.kernel_compiler import SOURCES
from adacorr_deploy.plugins.kernels import ELEMENT_BYTES, KERNELS, KernelLaunch, kernel_launch

COMPILER = shutil.which("g++")
NO_COMPILER = "needs g++, which compiles the CUDA kernels for the CPU"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

Array = Any  # of several dtypes
Arrays = Mapping[str, Array]
KernelArgument = ctypes.c_void_p | ctypes.c_int | ctypes.c_ulonglong
Outputs = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
FLOAT32 = np.dtype(np.float32)
OF_PRECISION = frozenset({"base", "fresh", "history", "modulation", "reference", "tokens"})  # inputs in p
PRECISIONS = tuple(ELEMENT_BYTES)
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a result in p
# Tokens that are whole vectors and that aren't, in each precision; blocks full, nearly, and just begun; DiT-XL's width.
SHAPES = [(3, 1, 1), (2, 3, 7), (2, 3, 8), (1, 1, 1152), (2, 255, 100), (1, 257, 144), (2, 256, 1152)]

_HOST_CUDA = Path(__file__).parent / "host_cuda"
_FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")
# Loops to unroll, lanes past a token's end, and jumps between stacks, which _FORTIFY_SOURCE takes for an attack.
_IGNORED = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-U_FORTIFY_SOURCE")
_ALIGNMENT = 16  # of a vector load


class HostKernels:
    """The library: `run_kernel` is what a driver's cuLaunchKernel is, for addresses of this process."""

    def __init__(self, library: Path) -> None:
        """Load the library."""
        self.path = library
        self._library = ctypes.CDLL(str(library))
        self._library.kernel_name.restype = ctypes.c_char_p
        self._library.last_error.restype = ctypes.c_char_p
        self._library.half_to_float.restype = ctypes.c_float
        self._library.half_to_float.argtypes = [ctypes.c_ushort]
        for rounding in (self._library.float_to_half, self._library.float_to_bfloat):
            rounding.restype = ctypes.c_ushort
            rounding.argtypes = [ctypes.c_float]

    @property
    def names(self) -> list[str]:
        """The kernels' entry points."""
        found: list[str] = []
        while name := self._library.kernel_name(len(found)):
            found.append(name.decode())
        return found

    def argument_count(self, entry: str) -> int:
        """Return how many arguments a kernel takes, −1 if there is no such kernel."""
        return int(self._library.kernel_arguments(entry.encode()))

    def run_kernel(
        self,
        entry: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        arguments: Sequence[KernelArgument],
        *,
        seed: int = 0,
    ) -> None:
        """Run a kernel over a grid, in an order of blocks, warps and lanes that `seed` shuffles (0: as numbered).

        Args:
            entry: Its name in the PTX.
            grid: Blocks in x, y, z.
            block: Threads in x, y, z.
            shared_bytes: Dynamic shared memory; the kernels take none.
            arguments: Addresses and 32-bit integers, in the kernel's order.
            seed: Of the order.

        Raises:
            RuntimeError: If there is no such kernel, or it did what would hang or spoil a GPU.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
        failed = self._library.run_kernel(entry.encode(), *sizes, shared_bytes, pointers, ctypes.c_ulonglong(seed))
        if failed:
            raise RuntimeError(f"{entry}: {self._library.last_error().decode()}")

    def conditions_set(self) -> list[tuple[int, int]]:
        """Return which conditions of graph nodes the last kernel set, handle and value, in order."""
        found: list[tuple[int, int]] = []
        handle, value = ctypes.c_ulonglong(), ctypes.c_uint()
        while self._library.condition_set(len(found), ctypes.byref(handle), ctypes.byref(value)):
            found.append((handle.value, value.value))
        return found

    def half_to_float(self, bits: int) -> float:
        """Return the value of a float16."""
        return float(self._library.half_to_float(bits))

    def float_to_half(self, value: float) -> int:
        """Return the bits of the nearest float16."""
        return int(self._library.float_to_half(value))

    def float_to_bfloat(self, value: float) -> int:
        """Return the bits of the nearest bfloat16."""
        return int(self._library.float_to_bfloat(value))


@functools.cache
def host_kernels() -> HostKernels:
    """Compile the library, once per state of its sources and user, and load it.

    Raises:
        RuntimeError: If it doesn't compile.
    """
    library, errors = _compiled()
    if errors:
        raise RuntimeError(errors[-4000:])
    return HostKernels(library)


@functools.cache
def _compiled() -> tuple[Path, str]:
    """Return the library and the compiler's errors, if any: hundreds of tests must not compile it in vain."""
    sources = sorted([*_HOST_CUDA.iterdir(), *SOURCES.iterdir()])
    digest = hashlib.sha256("".join((*_FLAGS, *_IGNORED)).encode() + b"".join(path.read_bytes() for path in sources))
    folder = Path(tempfile.gettempdir()) / f"adacorr-host-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:32]}.so"
    if library.exists():
        return library, ""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / library.name
        programs = [str(_HOST_CUDA / name) for name in ("runner.cpp", "scheduler.cpp")]
        paths = [f"-I{_HOST_CUDA}", f"-I{SOURCES}", "-o", str(made), *programs]
        command = [COMPILER or "g++", *_FLAGS, *_IGNORED, *paths]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            made.replace(library)
        return library, "" if result.returncode == 0 else result.stderr or "g++ failed"


class GuardedBuffer:
    """A buffer that ends where a page begins that can't be accessed, with one before it too.

    What lies between the buffer and those pages are ones, which are NaN to whoever reads them; `check` finds them whole
    or not. An access of a kernel to one of the pages fails its run.
    """

    def __init__(self, size_bytes: int, *, shift: int = 0) -> None:
        """Allocate it `shift` bytes past a multiple of 16, filled with ones."""
        pages = -(-(size_bytes + _ALIGNMENT + shift) // mmap.PAGESIZE) + 2
        self._mapping = mmap.mmap(-1, pages * mmap.PAGESIZE)
        memory = np.frombuffer(self._mapping, np.uint8)
        end = (pages - 1) * mmap.PAGESIZE
        start = (end - size_bytes - shift) // _ALIGNMENT * _ALIGNMENT + shift
        memory[:] = 0xFF
        self.bytes = memory[start : start + size_bytes]
        self._outside = (memory[mmap.PAGESIZE : start], memory[start + size_bytes : end])
        for page in (0, end):
            _forbid(memory.ctypes.data + page)

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def check(self, name: str) -> None:
        """Fail if anything was written outside."""
        for side in self._outside:
            assert (side == 0xFF).all(), f"{name}: written outside its buffer"


def _forbid(page: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def launch_of(kernel: str, precision: str, inputs: Arrays, outputs: Outputs) -> KernelLaunch:
    """Return the launch of a kernel over these tensors."""
    shapes = {name: tensor.shape for name, tensor in inputs.items()} | {name: out[0] for name, out in outputs.items()}
    return kernel_launch(KERNELS[kernel], precision, shapes)


def run_launch(
    launch: KernelLaunch,
    inputs: Arrays,
    outputs: Outputs,
    *,
    scratch: NDArray[np.float32] | None = None,
    seed: int = 0,
    unaligned: Collection[str] = (),
) -> Arrays:
    """Run a launch between guards and return its outputs.

    Args:
        launch: What to run.
        inputs: By name.
        outputs: Shapes and types, by name.
        scratch: Used and changed; else it is new and zero.
        seed: Of the order of blocks, warps and lanes.
        unaligned: Tensors that begin one element past a multiple of 16 bytes.
    """
    buffers: dict[str, GuardedBuffer] = {}
    for name in launch.inputs:
        buffers[name] = GuardedBuffer(inputs[name].nbytes, shift=inputs[name].itemsize * (name in unaligned))
        buffers[name].bytes[:] = _bytes_of(inputs[name])
    for name in launch.outputs:
        shape, dtype = outputs[name]
        buffers[name] = GuardedBuffer(math.prod(shape) * dtype.itemsize, shift=dtype.itemsize * (name in unaligned))
    if launch.scratch is not None:
        kept = np.zeros(launch.scratch, np.float32) if scratch is None else scratch
        buffers["scratch"] = GuardedBuffer(kept.nbytes)
        buffers["scratch"].bytes[:] = _bytes_of(kept)
    host_kernels().run_kernel(
        launch.entry, launch.grid, launch.block, launch.shared_bytes, _arguments(launch, buffers), seed=seed
    )
    for name, buffer in buffers.items():
        buffer.check(name)
    for name in launch.inputs:
        assert (buffers[name].bytes == _bytes_of(inputs[name])).all(), f"{name}: an input was changed"
    if scratch is not None:
        scratch.reshape(-1).view(np.uint8)[:] = buffers["scratch"].bytes
    return {name: buffers[name].bytes.copy().view(dtype).reshape(shape) for name, (shape, dtype) in outputs.items()}


def run_kernel_over(
    kernel: str, precision: str, inputs: Arrays, outputs: Outputs, *, seed: int = 0, unaligned: Collection[str] = ()
) -> Arrays:
    """Run a kernel over these tensors as the runtime would, and return its outputs; see `run_launch`."""
    return run_launch(launch_of(kernel, precision, inputs, outputs), inputs, outputs, seed=seed, unaligned=unaligned)


def _arguments(launch: KernelLaunch, buffers: Mapping[str, GuardedBuffer]) -> list[ctypes.c_void_p | ctypes.c_int]:
    addresses = {name: ctypes.c_void_p(buffer.address) for name, buffer in buffers.items()}
    arguments: list[ctypes.c_void_p | ctypes.c_int] = [addresses[name] for name in launch.inputs]
    arguments += [ctypes.c_int(value) for value in launch.integers]
    arguments += [addresses[name] for name in launch.outputs]
    return arguments if launch.scratch is None else [*arguments, addresses["scratch"]]


def _bytes_of(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def encoded(values: Array, precision: str) -> Array:
    """Return values as tokens: a float array, or for bfloat16 its bits in uint16 (nearest, ties to even)."""
    if precision != "bfloat16":
        return np.asarray(values).astype(precision)
    bits = np.asarray(values).astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def decoded(tokens: Array, precision: str) -> NDArray[np.float32]:
    """Return tokens as float32."""
    if precision != "bfloat16":
        return np.asarray(tokens).astype(np.float32)
    return (np.asarray(tokens).astype(np.uint32) << 16).view(np.float32)


def wide(inputs: Arrays, precision: str) -> Arrays:
    """Return the inputs of a part with the tensors of p as float32, for the oracle."""
    return {name: decoded(value, precision) if name in OF_PRECISION else value for name, value in inputs.items()}


def assert_close(found: Array, expected: Array, precision: str, *, atol: float = 2e-5) -> None:
    """Within a rounding to p and a few of float32: `atol`, by default of terms of up to 100."""
    tolerance = ROUNDING[precision] * np.abs(expected) + atol
    assert (np.abs(decoded(found, precision) - expected) <= tolerance).all()


def normal(seed: int, shape: tuple[int, ...], precision: str = "float32", size: float = 1.0) -> Array:
    """Return normal tokens of a standard deviation."""
    return encoded(size * np.random.default_rng(seed).standard_normal(shape), precision)
