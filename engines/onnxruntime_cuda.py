"""ONNX Runtime on an NVIDIA GPU: any bundle's ONNX files as they are, over the device runtime's buffers.

The sessions put their work on the device's own stream and don't wait for it, so it takes its place between our kernels
and copies without a synchronisation. Launches are not captured in graphs: ONNX Runtime may allocate while it runs.

It has not run on hardware: no GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import onnxruntime as ort

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec, TensorSpec
from adacorr_deploy.engines.backend import Artefact, Buffer, Launch, Session
from adacorr_deploy.engines.decision_graphs import no_decisions
from adacorr_deploy.engines.device_memory import device_buffer
from adacorr_deploy.engines.gpu_backend import GpuBackend
from adacorr_deploy.engines.onnxruntime_cpu import (
    LOG_FATAL_ONLY,
    OnnxRuntimeSession,
    Place,
    inference_session,
)

_PROVIDER: Final = "CUDAExecutionProvider"
_BFLOAT16: Final = 16  # of onnx.TensorProto: NumPy has no such type, and ONNX Runtime takes the number in its place


class OnnxRuntimeCudaBackend(GpuBackend):
    """Opens parts on a GPU. Nothing is compiled ahead but our kernels, in a bundle that is built for this backend."""

    name: Final = "onnxruntime-cuda"
    opens_onnx: Final = True
    engine_build: Final = None

    def __init__(self) -> None:
        """Check the installed ONNX Runtime.

        Raises:
            BackendUnavailableError: If it has no CUDA provider.
        """
        if _PROVIDER not in ort.get_available_providers():
            raise BackendUnavailableError(
                f"Backend {self.name} needs ONNX Runtime with CUDA; the installed {ort.__version__} has none. Install "
                "it with: pip uninstall onnxruntime && pip install 'adacorr-deploy[gpu]'"
            )
        super().__init__()

    def for_model(self, model: ModelSpec) -> None:
        """Take note of nothing: parts run at any size."""

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        """Check that ONNX Runtime takes the part, and return the ONNX file itself: nothing is compiled.

        Raises:
            BackendUnavailableError: If there is no GPU.
            EngineError: With ONNX Runtime's reason, or the difference between the file and its spec.
        """
        if (kernels := self.build_service_part(spec, artefact_dir)) is not None:
            return kernels
        artefact = Artefact(path=onnx_path)
        self.open(artefact, spec).close()
        return artefact

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Return at once: nothing is compiled for a machine."""

    def open(self, artefact: Artefact, spec: PartSpec) -> Session:
        """Open a part.

        Raises:
            BackendUnavailableError: If there is no GPU.
            EngineError: If the file is missing, corrupt, needs what this version lacks, or has other tensors; or if
                ONNX Runtime can't use the GPU.
        """
        if (kernels := self.open_service_part(artefact, spec)) is not None:
            return kernels
        stream = str(int(self.device.stream.handle))
        provider = (_PROVIDER, {"device_id": str(self.device.ordinal), "user_compute_stream": stream})
        session = inference_session(artefact, spec, _session_options(), [provider])
        if _PROVIDER not in session.get_providers():
            raise EngineError(
                f"{spec.name}: ONNX Runtime {ort.__version__} can't use {self.device}. Check that CUDA and cuDNN of "
                "the versions that it needs are installed: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return OnnxRuntimeSession(spec, session, self._place, _run_options())

    def fuse(self, launches: Sequence[Launch]) -> None:
        """Return None: these launches can't be captured."""

    def decision_graphs(self) -> NoReturn:
        """Refuse.

        Raises:
            EngineError: Always: these launches can't be captured.
        """
        raise no_decisions(self.name, "ONNX Runtime may allocate while it runs, so its launches can't be in a graph")

    def _place(self, tensor: TensorSpec, buffer: Buffer) -> Place:
        placed = device_buffer(buffer, self.device)
        element = _BFLOAT16 if placed.dtype is DType.BFLOAT16 else placed.dtype.numpy.type
        return tensor.name, "cuda", self.device.ordinal, element, placed.shape, placed.address


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = LOG_FATAL_ONLY
    return options


def _run_options() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
