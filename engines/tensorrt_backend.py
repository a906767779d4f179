"""TensorRT and TensorRT for RTX behind the backend protocol: one code for the two modules of tensorrt_modules.py.

TensorRT for RTX compiles without a GPU; opening plans needs one with either module. What opens and runs them was
written against the documented API and has not run on hardware: no GPU was at hand.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Final

from adacorr_deploy.core.engine_build import CompilerOptions, EngineBuild
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import ModelSpec, PartSpec
from adacorr_deploy.engines.backend import Artefact, Session
from adacorr_deploy.engines.gpu_backend import GpuBackend
from adacorr_deploy.engines.tensorrt_compiler import TensorRTCompiler
from adacorr_deploy.engines.tensorrt_modules import TensorRTModule
from adacorr_deploy.engines.tensorrt_session import Plans, TensorRTSession


class TensorRTBackend(GpuBackend):
    """Builds and opens plans; service parts are our own kernels."""

    opens_onnx: Final = False

    def __init__(self, module: TensorRTModule, options: CompilerOptions | None = None) -> None:
        """Load the module.

        Raises:
            BackendUnavailableError: If the module is not installed.
            EngineError: If it can't do what the options ask.
        """
        super().__init__()
        self._module = module
        self._trt = module.load()
        self._compiler = TensorRTCompiler(module, options or CompilerOptions())

    @property
    def name(self) -> str:
        return self._module.backend

    @property
    def engine_build(self) -> EngineBuild:
        build = self._compiler.description
        return build if self._module.compiles_without_gpu else build.for_gpu(self.device.compute_capability)

    def for_model(self, model: ModelSpec) -> None:
        """Compile for the sizes of the model's latents; errors as `Profile.for_latents`."""
        self._compiler.for_latents(model.latents)

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        """Compile a part; where weights are inputs, parts of one structure share a plan.

        Raises:
            BackendUnavailableError: If the compiler of our kernels is not installed.
            EngineError: With the compiler's reason, if it refuses the part.
            OSError: If the plan can't be written.
        """
        if (kernels := self.build_service_part(spec, artefact_dir)) is not None:
            return kernels
        artefact = self._compiler.compile(onnx_path, spec, artefact_dir)
        self._compiler.keep_tunings()
        return artefact

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Compare what the plans were compiled for with the installed module and the GPU.

        Raises:
            BackendUnavailableError: If there is no GPU.
            EngineError: If they differ; the message says what was found, what is needed, and how to rebuild.
        """
        if build is None:
            raise EngineError(f"The bundle does not say how its {self.name} engines were compiled. {self._rebuild()}")
        here = str(self._trt.__version__)
        if build.version != here and not (build.version_compatible and _major(build.version) == _major(here)):
            raise EngineError(
                f"The bundle's engines were compiled with {self._module.title} {build.version}, and {here} is "
                f"installed here. Install {self._module.package}=={build.version}, or rebuild: {self._rebuild()}"
            )
        if not self._module.compiles_without_gpu and self.device.compute_capability not in build.targets:
            raise EngineError(
                f"The bundle's engines were compiled for {', '.join(build.targets)}, and {self.device} is "
                f"{self.device.compute_capability}. Rebuild on this machine: {self._rebuild()}"
            )

    def open(self, artefact: Artefact, spec: PartSpec) -> Session:
        """Open a plan that `build` made.

        Raises:
            BackendUnavailableError: If there is no GPU.
            EngineError: If it can't be opened here.
        """
        return self.open_service_part(artefact, spec) or TensorRTSession(spec, self._plans, artefact)

    def close(self) -> None:
        """Free everything on the GPU."""
        if "_plans" in vars(self):
            self._plans.close()
        super().close()

    @cached_property
    def _plans(self) -> Plans:
        return Plans(self._module, self._trt, self.device)

    def _rebuild(self) -> str:
        return f"adacorr-build MODEL -o BUNDLE --overwrite --backend {self.name}"


def _major(version: str) -> str:
    return version.partition(".")[0]
