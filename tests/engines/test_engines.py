"""The table of backends: what it lists opens, and what it doesn't is refused with the next step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import onnxruntime
import pytest

from adacorr_deploy.core.engine_build import CompilerOptions
from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.engines import backend_by_name


@pytest.mark.parametrize(
    ("name", "needs"), [("onnxruntime", "onnxruntime"), ("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")]
)
def test_a_backend_carries_its_own_name_or_says_how_to_install_it(name: str, needs: str) -> None:
    if importlib.util.find_spec(needs) is not None:
        assert backend_by_name(name).name == name
    else:
        with pytest.raises(BackendUnavailableError, match=rf"Backend {name} can't be loaded.*'adacorr-deploy\["):
            backend_by_name(name)


def test_an_onnxruntime_without_cuda_says_which_one_is_needed() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the installed ONNX Runtime has CUDA")
    with pytest.raises(BackendUnavailableError, match=r"pip uninstall onnxruntime && pip install"):
        backend_by_name("onnxruntime-cuda")


def test_a_backend_that_compiles_nothing_takes_no_options_of_a_compiler() -> None:
    with pytest.raises(EngineError, match="compiles nothing"):
        backend_by_name("onnxruntime", CompilerOptions())


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(BackendUnavailableError, match=r"'tensorflow'. Known: onnxruntime"):
        backend_by_name("tensorflow")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adacorr_deploy.engines.onnxruntime_cpu", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'adacorr-deploy\[cpu\]'"):
        backend_by_name("onnxruntime")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import adacorr_deploy.engines", ("onnxruntime", "torch", "onnx")),
        ("import adacorr_deploy.engines as e; e.backend_by_name('onnxruntime')", ("torch", "onnx", "diffusers")),
        ("import adacorr_deploy.engines.torch_reference", ("torch", "onnx", "onnxruntime")),
    ],
)
def test_a_backend_loads_only_what_it_needs(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
