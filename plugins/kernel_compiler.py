"""CUDA C++ → PTX, by NVRTC: the compiler as a library, which needs neither a GPU nor a driver nor the CUDA toolkit.

Its version is pinned: 13.0 writes PTX 9.0, which drivers from 580 on take, and newer ones write PTX that they refuse.
"""

from __future__ import annotations

import functools
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError

SOURCES: Final = Path(__file__).resolve().parent / "cuda"
PORTABLE: Final = "compute_80"  # PTX that every GPU from compute capability 8.0 on translates when it is loaded
TARGETS: Final = (
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_120",
)  # GPUs that the kernels are compiled for in CI
NVRTC_VERSION: Final = (13, 0)

KERNELS_PROGRAM: Final = "kernels.cu"  # what the service parts are computed by
DECISIONS_PROGRAM: Final = "decisions.cu"  # what decides within a graph

# Products and sums are fused where the source says so and nowhere else: a CPU then gives the same bits.
_OPTIONS: Final = ("--std=c++17", "--fmad=false", "--ptxas-options=--verbose", f"--include-path={SOURCES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernels:
    """What the compiler left: PTX text and its own words, which for an `sm_…` target tell registers and spills."""

    ptx: bytes
    log: str


def compile_kernels(arch: str = PORTABLE, program: str = KERNELS_PROGRAM) -> bytes:
    """Return the PTX of every kernel of a program.

    Args:
        arch: `compute_80` (portable), or a GPU as `sm_86`: the kernels are then also assembled for it, as a check.
        program: One of the two above.

    Raises:
        BackendUnavailableError: If NVRTC 13.0 is not installed.
        EngineError: If the target is unknown, or the kernels don't compile for it.
    """
    return compiled_kernels(arch, program).ptx


@functools.cache
def compiled_kernels(arch: str, program: str = KERNELS_PROGRAM) -> CompiledKernels:
    """Compile a program once per process; see `compile_kernels`."""
    nvrtc = _nvrtc()
    if not re.fullmatch(r"(sm|compute)_[0-9]{2,3}", arch):
        raise EngineError(f"GPU {arch[:40]!r} is not a target; allowed are {PORTABLE}, {', '.join(TARGETS)}.")
    source = (SOURCES / program).read_bytes()
    handle = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source, program.encode(), 0, [], []))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *_OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(handle, len(options), options)
        log = _text(nvrtc, handle, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise EngineError(_refusal(arch, status.name, log))
        return CompiledKernels(ptx=_text(nvrtc, handle, "PTX").rstrip(b"\0"), log=log)
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def _refusal(arch: str, status: str, log: str) -> str:
    first = next((line.strip() for line in log.splitlines() if "error" in line), status)
    return f"The kernels don't compile for {arch}: {first[:300]}. Compile for one of {PORTABLE}, {', '.join(TARGETS)}."


def _nvrtc() -> ModuleType:
    """Import NVRTC's bindings and see that its library is there, in the version that is pinned."""
    install = "Install it with: pip install 'adacorr-deploy[cuda,kernels]'"
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        _status, *version = nvrtc.nvrtcVersion()
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # the bindings raise RuntimeError where the library is missing
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendUnavailableError(f"The CUDA compiler NVRTC can't be loaded ({first}). {install}") from error
    if tuple(version) != NVRTC_VERSION:
        found, wanted = (".".join(map(str, numbers)) for numbers in (version, NVRTC_VERSION))
        raise BackendUnavailableError(
            f"NVRTC {found} is installed, and {wanted} is needed: later ones write PTX that current drivers refuse. "
            f"Install it with: pip install 'nvidia-cuda-nvrtc=={wanted}.*'"
        )
    return nvrtc


def _checked(nvrtc: ModuleType, answer: tuple[object, object]) -> object:
    status, value = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"NVRTC failed: {status}. Reinstall it with: pip install --force-reinstall nvidia-cuda-nvrtc")
    return value


def _text(nvrtc: ModuleType, program: object, what: str) -> bytes:
    """Return what NVRTC keeps of a program: its two calls give the size and fill a buffer of that size."""
    size = _checked(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    buffer = bytearray(int(str(size)))
    (status,) = getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    _checked(nvrtc, (status, None))
    return bytes(buffer)
