"""Builds stand_in_driver/ and runs Python on it: processes for which it is the NVIDIA driver."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.plugins.host_kernels import COMPILER, host_kernels

_SOURCES = Path(__file__).parent / "stand_in_driver"
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")


@functools.cache
def stand_in_folder() -> Path:
    """Compile the driver, once per state of its sources and user, and return the folder that holds libcuda.so.1."""
    sources = sorted(_SOURCES.glob("*.[ch]*"))
    digest = hashlib.sha256("".join(_FLAGS).encode() + b"".join(path.read_bytes() for path in sources))
    folder = Path(tempfile.gettempdir()) / f"adacorr-stand-in-{os.getuid()}" / digest.hexdigest()[:32]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            programs = [str(path) for path in sources if path.suffix == ".cpp"]
            command = [COMPILER or "g++", *_FLAGS, "-o", str(made), *programs, "-ldl"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise RuntimeError(result.stderr[-4000:])
            made.replace(library)
    return folder


def run_on_stand_in(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the stand-in for its driver.

    Args:
        arguments: Of Python.
        settings: Environment variables of the stand-in; its README names them.
    """
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{stand_in_folder()}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "STAND_IN_DRIVER": "1",
        "STAND_IN_KERNELS": str(host_kernels().path),
        **settings,
    }
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
