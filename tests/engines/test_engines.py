"""The table of backends: what it lists opens, and what it doesn't is refused with the next step."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adacorr_deploy.core.errors import BackendUnavailableError
from adacorr_deploy.engines import BACKENDS, backend_by_name


def test_each_listed_backend_carries_its_own_name() -> None:
    for name in BACKENDS:
        assert backend_by_name(name).name == name


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(BackendUnavailableError, match=r"'tensorflow'. Known: onnxruntime"):
        backend_by_name("tensorflow")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adacorr_deploy.engines.onnxruntime_cpu", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install adacorr-deploy\[cpu\]"):
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
