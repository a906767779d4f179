"""What every test shares: one thread per process, no network, repeatable properties, skips for absent hardware."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

# Read by PyTorch, NumPy and the hub client when they are first imported, which no test module has done yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("adacorr", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("adacorr")

FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """Return the folder that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """Return the folder of the real Fashion-MNIST, or skip the test where it is not installed."""
    if not FASHION_MNIST_DIR.is_dir():
        pytest.skip("Fashion-MNIST is not installed (Debian: apt-get install dataset-fashion-mnist)")
    return FASHION_MNIST_DIR


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs hardware or packages that are not here; ask for them only if such a test was collected."""
    for marker, is_available, reason in (
        ("gpu", _has_nvidia_gpu, "no NVIDIA GPU"),
        ("triton", _has_triton, "no Triton server is installed: bash tools/serving/install_triton.sh"),
        ("trt", _has_tensorrt, "neither tensorrt nor tensorrt_rtx is installed"),
    ):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_nvidia_gpu() -> bool:
    if "STAND_IN_DRIVER" in os.environ:  # in the processes that tests/engines/test_stand_in_driver.py starts
        return True
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0


def _has_triton() -> bool:
    from adacorr_deploy.core.errors import BackendUnavailableError
    from adacorr_deploy.serving.local_server import installed_triton

    try:
        installed_triton()
    except BackendUnavailableError:
        return False
    return True


def _has_tensorrt() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("tensorrt", "tensorrt_rtx"))
