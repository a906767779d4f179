"""What the backends on an NVIDIA GPU share: the device, its buffers, and our kernels for the service parts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Artefact, Launch
from adacorr_deploy.engines.decision_graphs import DECIDE_ON_HOST
from adacorr_deploy.engines.device import Device, gpu_is_available
from adacorr_deploy.engines.device_decisions import DeviceDecisions
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.kernel_session import KernelLibrary, KernelSession
from adacorr_deploy.plugins.kernels import kernel_of_part

_KERNELS_FILE: Final = "kernels.ptx"
_DECISIONS_FILE: Final = "decisions.ptx"  # beside it


class GpuBackend:
    """The common part; a GPU is asked for when something is first opened or allocated."""

    precisions: Final = frozenset({DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16})

    def __init__(self) -> None:
        self._libraries: dict[Path, KernelLibrary] = {}
        self._decisions: DeviceDecisions | None = None

    def is_available(self) -> bool:
        """Whether there is a GPU."""
        return gpu_is_available()

    @property
    def hardware(self) -> str:
        return f"{self.device}, {self.device.compute_capability}"

    @cached_property
    def device(self) -> Device:
        """The GPU.

        Raises:
            BackendUnavailableError: If there is none.
        """
        return Device.open()

    def build_service_part(self, spec: PartSpec, directory: Path) -> Artefact | None:
        """Write the kernels that compute a service part, one file for all such parts; None for any other part.

        Beside it go the kernels that decide within graphs, which no part names.

        Raises:
            BackendUnavailableError: If the kernels' compiler is not installed.
            OSError: If the file can't be written.
        """
        if kernel_of_part(spec.name) is None:
            return None
        path = directory / _KERNELS_FILE
        if not path.exists():
            from adacorr_deploy.plugins.kernel_compiler import DECISIONS_PROGRAM, KERNELS_PROGRAM, compile_kernels

            programs = {_DECISIONS_FILE: DECISIONS_PROGRAM, _KERNELS_FILE: KERNELS_PROGRAM}
            texts = {name: compile_kernels(program=program) for name, program in programs.items()}
            directory.mkdir(parents=True, exist_ok=True)
            for name, ptx in texts.items():
                (directory / name).write_bytes(ptx)
        return Artefact(path=path)

    def open_service_part(self, artefact: Artefact, spec: PartSpec) -> KernelSession | None:
        """Open what `build_service_part` made; None for any other artefact.

        Raises:
            EngineError: If it can't be opened here.
        """
        path = artefact.path
        if path.name != _KERNELS_FILE:
            return None
        if path not in self._libraries:
            try:
                self._libraries[path] = KernelLibrary(self.device, path.read_bytes())
            except OSError as error:
                raise EngineError(f"{spec.name}: {path} can't be read: {error}. Rebuild the bundle.") from error
        return self._libraries[path].open(spec)

    def open_noise(self, spec: PartSpec) -> KernelSession | None:
        """Return the kernel that makes a request's normals, if the bundle brought our kernels."""
        library = next(iter(self._libraries.values()), None)
        return library.open(spec) if library is not None else None

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> DeviceBuffer:
        """Return a zeroed buffer on the GPU, 256-byte aligned.

        Raises:
            EngineError: If the memory can't be had.
        """
        return self.device.allocate(shape, dtype)

    def synchronize(self) -> None:
        """Return when every launch so far has finished.

        Raises:
            EngineError: If one of them failed.
        """
        self.device.synchronize()

    def fuse(self, launches: Sequence[Launch]) -> DeviceLaunch | None:
        """Return one launch that replays these as a graph, or None if that saves nothing or can't be."""
        return self.device.fuse(launches)

    def decision_graphs(self) -> DeviceDecisions:
        """Return what makes graphs that decide while they run.

        Raises:
            EngineError: If the bundle brought no kernels for it, or the driver can't take them.
        """
        if self._decisions is None:
            kernels = next(iter(self._libraries), None)
            path = kernels.with_name(_DECISIONS_FILE) if kernels is not None else None
            if path is None or not path.is_file():
                raise EngineError(
                    f"The bundle holds no {_DECISIONS_FILE}, the kernels that decide on the device. Rebuild it with "
                    f"adacorr-build. {DECIDE_ON_HOST}"
                )
            self._decisions = DeviceDecisions(self.device, path.read_bytes())
        return self._decisions

    def close(self) -> None:
        """Free everything on the GPU."""
        self._libraries.clear()
        self._decisions = None
        if "device" in vars(self):
            self.device.close()
