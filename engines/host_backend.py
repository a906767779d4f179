"""What backends on the CPU have in common: host memory, launches that are finished when they return, any machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec
from adacorr_deploy.engines.backend import Launch
from adacorr_deploy.engines.decision_graphs import no_decisions
from adacorr_deploy.engines.host_memory import HostBuffer


class HostBackend:
    """The half of a backend that isn't an engine's own."""

    hardware: Final = "CPU"
    opens_onnx: Final = True
    engine_build: Final = None

    @property
    def name(self) -> str:
        raise NotImplementedError

    def for_model(self, model: ModelSpec) -> None:
        """Take note of nothing: parts run at any size."""

    def is_available(self) -> bool:
        """Return True: a CPU is."""
        return True

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Return at once: nothing is compiled for a machine."""

    def open_noise(self, spec: PartSpec) -> None:
        """Return None: buffers are in the host's memory."""

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> HostBuffer:
        """Return a zeroed buffer, 64-byte aligned."""
        return HostBuffer.allocate(shape, dtype)

    def synchronize(self) -> None:
        """Return at once: a launch on the CPU is finished when `run` returns."""

    def close(self) -> None:
        """Return at once: buffers and sessions hold what there is."""

    def fuse(self, launches: Sequence[Launch]) -> None:
        """Return None: there is nothing to save."""

    def decision_graphs(self) -> NoReturn:
        """Refuse.

        Raises:
            EngineError: Always: there are no graphs on a CPU.
        """
        raise no_decisions(self.name, "it runs on the CPU")
