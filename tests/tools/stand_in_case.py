"""engine_case.py on the stand-in for NVIDIA's driver, whose engines are ONNX Runtime's in functions of its stream.

They take the place of `tensorrt-rtx`: the device's buffers, copies and graphs, and our kernels, are the product's.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "tools" / "benchmarks")]

from engine_case import main  # noqa: E402

from adacorr_deploy import engines  # noqa: E402
from adacorr_deploy.core.engine_build import EngineBuild  # noqa: E402
from adacorr_deploy.core.specs import ModelSpec, PartSpec  # noqa: E402
from adacorr_deploy.engines.backend import Artefact, Session  # noqa: E402
from adacorr_deploy.engines.gpu_backend import GpuBackend  # noqa: E402
from tests.runtime.device_engines import FunctionSession  # noqa: E402

Arrays = Mapping[str, NDArray[np.generic]]


class StandInEngines(GpuBackend):
    name = "tensorrt-rtx"
    opens_onnx = False
    engine_build = None

    def for_model(self, model: ModelSpec) -> None:
        """Take note of nothing: parts run at any size."""

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        return self.build_service_part(spec, artefact_dir) or Artefact(path=onnx_path)

    def check_compatible(self, build: EngineBuild | None) -> None:
        """ONNX files run anywhere."""

    def open(self, artefact: Artefact, spec: PartSpec) -> Session:
        if (kernels := self.open_service_part(artefact, spec)) is not None:
            return kernels
        session = ort.InferenceSession(str(artefact.path), providers=["CPUExecutionProvider"])
        names = [tensor.name for tensor in spec.outputs]

        def run(inputs: Arrays) -> dict[str, NDArray[np.generic]]:
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

        return FunctionSession(self, spec, run)


if __name__ == "__main__":
    with patch.dict(engines.BACKENDS, {StandInEngines.name: lambda options: StandInEngines()}):
        sys.exit(main())
