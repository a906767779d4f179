"""A server needs neither PyTorch nor ONNX's own packages: nothing that serves loads them, whatever is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD_TIME_ONLY = (
    "diffusers",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "polygraphy",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
    "torchmetrics",
    "transformers",
)

# The only modules below the quality layer that may load them; they are imported by name, when a build needs them.
BUILD_TIME_MODULES = (
    "adacorr_deploy.engines.torch_reference",
    "adacorr_deploy.plugins.onnx_functions",
    "adacorr_deploy.plugins.onnx_service_parts",
)

LOADED = f"""
loaded = sorted(name for name in {BUILD_TIME_ONLY!r} if name in sys.modules)
print(" ".join(loaded))
"""


def _run(script: str, folder: Path) -> str:
    """Run `script` in a new interpreter, away from the repository's folder, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "adacorr_deploy",
        "adacorr_deploy.core",
        "adacorr_deploy.caching",
        "adacorr_deploy.plugins",
        "adacorr_deploy.engines",
        "adacorr_deploy.runtime",
        "adacorr_deploy.serving.triton_model",
        "adacorr_deploy.cli.run",
    ],
)
def test_importing_what_serves_loads_no_build_time_package(module: str, tmp_path: Path) -> None:
    assert _run(f"import sys, {module}\n{LOADED}", tmp_path) == ""


def test_no_module_below_the_quality_layer_loads_a_build_time_package(tmp_path: Path) -> None:
    """Walks the packages, so that a new backend or policy is covered the day it is written."""
    script = f"""
import importlib, pkgutil, sys
count = 0
for layer in ("core", "caching", "plugins", "engines", "runtime", "serving"):
    package = importlib.import_module("adacorr_deploy." + layer)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name not in {BUILD_TIME_MODULES!r}:
            importlib.import_module(module.name)
            count += 1
print(count)
{LOADED}
"""
    count, *loaded = _run(script, tmp_path).split()
    assert loaded == []
    assert int(count) >= 10


def test_the_probe_sees_a_package_that_is_loaded(tmp_path: Path) -> None:
    assert _run(f"import sys, safetensors\n{LOADED}", tmp_path) == "safetensors"


def test_the_three_top_folders_are_not_importable_by_their_bare_names(tmp_path: Path) -> None:
    script = """
import importlib.util
print([name for name in ("exporters", "engines", "plugins") if importlib.util.find_spec(name)])
"""
    assert _run(script, tmp_path) == "[]"
