"""Without a GPU the GPU runtime says in one line what it found."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adacorr_deploy.core.errors import BackendUnavailableError
from adacorr_deploy.engines.cuda_core import load_cuda
from adacorr_deploy.engines.device import Device


def test_importing_the_runtime_loads_no_cuda() -> None:
    script = (
        "import sys, adacorr_deploy.engines.device, adacorr_deploy.engines.kernel_session;"
        "print([name for name in sys.modules if name == 'cuda' or name.startswith('cuda.')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    load_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(BackendUnavailableError, match=r"can't be loaded .* pip install 'adacorr-deploy\[gpu\]'"):
        load_cuda()


def test_a_machine_without_a_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = load_cuda()

    def no_driver(flags: int) -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(cuda.driver, "cuInit", no_driver)
    with pytest.raises(
        BackendUnavailableError, match=r"No GPU can be used here \(Failed to dlopen libcuda.so.1\)"
    ) as no:
        Device.open()
    assert "--backend onnxruntime, which runs bundles of fp32 and fp16 on the CPU; those of bf16 need" in str(no.value)
