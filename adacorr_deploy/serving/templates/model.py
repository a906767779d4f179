"""Loaded by Triton's Python backend; beside it lies the runtime that the repository was written with."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from adacorr_deploy.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
