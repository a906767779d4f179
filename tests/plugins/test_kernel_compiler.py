"""The kernels compile for every target, with the entry points and arguments of the table, without a GPU."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from types import ModuleType

import pytest

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.plugins import kernel_compiler
from adacorr_deploy.plugins.decision_kernels import DECIDE_KERNEL, NOTE_KERNEL
from adacorr_deploy.plugins.kernel_compiler import (
    DECISIONS_PROGRAM,
    KERNELS_PROGRAM,
    PORTABLE,
    SOURCES,
    TARGETS,
    compile_kernels,
    compiled_kernels,
)
from adacorr_deploy.plugins.kernels import ELEMENT_BYTES, KERNELS


def _is_installed(distribution: str) -> bool:
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_nvrtc = pytest.mark.skipif(
    not (_is_installed("cuda-bindings") and _is_installed("nvidia-cuda-nvrtc")),
    reason="needs NVRTC: pip install 'adacorr-deploy[cuda,kernels]'",
)


def expected_parameters(program: str = KERNELS_PROGRAM) -> dict[str, list[str]]:
    """Return each entry's parameters by its spec: addresses, 32-bit sizes, addresses."""
    if program == DECISIONS_PROGRAM:  # the decision ends with the condition of its switch, a handle of 64 bits
        return {DECIDE_KERNEL: ["u64"] * 4 + ["u32"] * 5 + ["u64"] * 3, NOTE_KERNEL: ["u64"] * 3}
    return {
        kernel.entry(precision): ["u64"] * len(kernel.inputs)
        + ["u32"] * len(kernel.sizes)
        + ["u64"] * (len(kernel.outputs) + bool(kernel.scratch))
        for kernel in KERNELS.values()
        for precision in ELEMENT_BYTES
    }


both_programs = pytest.mark.parametrize("program", [KERNELS_PROGRAM, DECISIONS_PROGRAM])


@needs_nvrtc
@both_programs
def test_the_ptx_has_every_kernel_with_the_arguments_of_its_spec(program: str) -> None:
    text = compile_kernels(program=program).decode()
    entries = dict(re.findall(r"\.visible \.entry (\w+)\((.*?)\)", text, re.DOTALL))
    found = {name: re.findall(r"\.param \.(u\d+)", parameters) for name, parameters in entries.items()}
    assert found == expected_parameters(program)


@needs_nvrtc
def test_only_decisions_need_a_function_of_the_driver() -> None:
    """CUDA's own linker leaves it open, with its device library or without: it is resolved when a driver loads it."""
    found = {
        program: re.findall(r"\.extern \.func (\w+)", compile_kernels(program=program).decode())
        for program in (KERNELS_PROGRAM, DECISIONS_PROGRAM)
    }
    assert found == {KERNELS_PROGRAM: [], DECISIONS_PROGRAM: ["cudaGraphSetConditional"]}


@needs_nvrtc
@both_programs
def test_the_portable_ptx_is_for_compute_capability_8_0_in_the_version_that_drivers_take(program: str) -> None:
    text = compile_kernels(PORTABLE, program).decode()
    assert re.findall(r"^\.(version|target) (\S+)$", text, re.MULTILINE) == [("version", "9.0"), ("target", "sm_80")]


@needs_nvrtc
@both_programs
@pytest.mark.parametrize("target", TARGETS)
def test_they_assemble_for_every_target_with_no_register_spilled(target: str, program: str) -> None:
    compiled = compiled_kernels(target, program)
    assert f".target {target}".encode() in compiled.ptx
    names = re.findall(r"Compiling entry function '(\w+)'", compiled.log)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    assert sorted(names) == sorted(expected_parameters(program))
    assert len(spills) == len(names) and set(spills) == {("0", "0", "0")}


def test_the_sources_say_what_the_table_and_the_oracle_say() -> None:
    """Constants that stand in both languages."""
    from adacorr_deploy.core.sampler_rows import COLUMNS
    from adacorr_deploy.plugins import kernels, oracle

    text = "".join(path.read_text() for path in SOURCES.iterdir())
    found = dict(re.findall(r"constexpr \w+ (\w+) = ([0-9.e-]+)f?;", text))
    assert float(found["EPSILON"]) == oracle.EPSILON
    assert int(found["COLUMNS"]) == len(COLUMNS)
    assert int(found["TOKENS"]) == kernels.TOKENS_OF_A_THREAD
    assert int(found["THREADS"]) == KERNELS["predict"].threads == KERNELS["blend"].threads


@needs_nvrtc
@pytest.mark.parametrize("target", ["sm_42", "sm_9000", "gpu", "", "sm_86 --help"])
def test_an_unknown_target_is_refused_and_the_known_are_named(target: str) -> None:
    with pytest.raises(EngineError, match="sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"):
        compile_kernels(target)


def fake_nvrtc(monkeypatch: pytest.MonkeyPatch, version: object) -> None:
    module = ModuleType("cuda.bindings.nvrtc")

    def nvrtc_version() -> object:
        if isinstance(version, Exception):
            raise version
        return version

    module.nvrtcVersion = nvrtc_version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", module)
    kernel_compiler.compiled_kernels.cache_clear()


def test_another_version_of_nvrtc_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, (0, 13, 5))
    with pytest.raises(
        BackendUnavailableError, match=r"NVRTC 13\.5 .* 13\.0 is needed.*'nvidia-cuda-nvrtc==13\.0\.\*'"
    ):
        compile_kernels()


def test_a_missing_nvrtc_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvrtc(monkeypatch, RuntimeError("Failed to find libnvrtc.so\nand more"))
    with pytest.raises(
        BackendUnavailableError, match=r"\(Failed to find libnvrtc\.so\)\. .*adacorr-deploy\[cuda,kernels\]"
    ):
        compile_kernels()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(BackendUnavailableError, match=r"adacorr-deploy\[cuda,kernels\]"):
        compile_kernels()
