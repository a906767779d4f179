"""The reference backend: a model's own PyTorch modules behind the protocol of compiled engines.

The same runtime and policy over these parts give the policy's error alone; the difference to a compiled backend is the
engine's error. PyTorch is imported when the first session is opened, never with this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.core.specs import DType, ModelSpec, PartSpec
from adacorr_deploy.engines.backend import Artefact, Buffer, Launch
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.decision_graphs import no_decisions
from adacorr_deploy.engines.host_memory import HostBuffer, host_array

if TYPE_CHECKING:
    import torch


class TorchBackend:
    """Runs parts given as modules: part name → module whose forward takes the inputs by name.

    A module returns its outputs as a tuple in the order of the part's spec (or one tensor, if there is one output).
    """

    name: Final = "torch"
    precisions: Final = frozenset({DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16})
    hardware: Final = "CPU"
    opens_onnx: Final = True
    engine_build: Final = None

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = dict(modules)

    def for_model(self, model: ModelSpec) -> None:
        """Take note of nothing: parts run at any size."""

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        """Return `onnx_path` as it is: the module takes its place.

        Raises:
            EngineError: If there is no module for the part.
        """
        self._module(spec)
        return Artefact(path=onnx_path)

    def is_available(self) -> bool:
        """Return True: a CPU is."""
        return True

    def check_compatible(self, build: EngineBuild | None) -> None:
        """Return at once: nothing is compiled for a machine."""

    def open(self, artefact: Artefact, spec: PartSpec) -> TorchSession:
        """Open the part's module; no file is read.

        Raises:
            EngineError: If there is no module for the part.
            BackendUnavailableError: If PyTorch is not installed.
        """
        return TorchSession(spec, self._module(spec))

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
        raise no_decisions(self.name, "it runs on the host")

    def _module(self, spec: PartSpec) -> torch.nn.Module:
        try:
            return self._modules[spec.name]
        except KeyError:
            known = ", ".join(sorted(self._modules))
            raise EngineError(f"There is no PyTorch module for part {spec.name}. There are: {known}.") from None


class TorchSession:
    """A part's module, in evaluation mode."""

    def __init__(self, spec: PartSpec, module: torch.nn.Module) -> None:
        try:
            import torch  # noqa: F401 - asked for here, so that a missing PyTorch is one clear error
        except ImportError as error:
            raise BackendUnavailableError(
                "The torch backend needs PyTorch: pip install adacorr-deploy[build]"
            ) from error
        self._spec = spec
        self._module: torch.nn.Module | None = module.eval()
        self._launches = 0

    @property
    def spec(self) -> PartSpec:
        return self._spec

    @property
    def launches(self) -> int:
        return self._launches

    def bind(self, buffers: Mapping[str, Buffer]) -> TorchLaunch:
        """Bind every input and output: the tensors share memory with the buffers.

        Raises:
            EngineError: If a tensor is missing, doesn't fit, or an output overlaps another tensor.
        """
        import torch

        check_binding(self._spec, buffers)
        tensors = {name: torch.from_numpy(host_array(buffer)) for name, buffer in buffers.items()}
        inputs = {tensor.name: tensors[tensor.name] for tensor in self._spec.inputs}
        outputs = tuple(tensors[tensor.name] for tensor in self._spec.outputs)
        return TorchLaunch(self, inputs, outputs)

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        """Run the module, copy its results into `outputs`, and count it; `TorchLaunch.run` is the way in.

        Raises:
            EngineError: If the module fails, returns other tensors than the spec says, or the session is closed.
        """
        import torch

        if self._module is None:
            raise EngineError(f"{self._spec.name}: the session is closed. Open it again.")
        with torch.inference_mode():
            try:
                results = self._module(**inputs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise EngineError(f"{self._spec.name}: the PyTorch module failed while running: {error}") from error
            results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
            self._check_results(results, outputs)
            for bound, result in zip(outputs, results, strict=True):
                bound.copy_(result)
        self._launches += 1

    def close(self) -> None:
        """Let go of the module."""
        self._module = None

    def _check_results(self, results: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        found = [(tuple(result.shape), result.dtype) for result in results]
        wanted = [(tuple(output.shape), output.dtype) for output in outputs]
        if found != wanted:
            raise EngineError(f"{self._spec.name}: the PyTorch module returned {found}, the spec says {wanted}.")


class TorchLaunch:
    """A module bound to tensors over its buffers; each tensor keeps its buffer's memory alive."""

    __slots__ = ("_inputs", "_outputs", "_session")

    def __init__(
        self, session: TorchSession, inputs: Mapping[str, torch.Tensor], outputs: tuple[torch.Tensor, ...]
    ) -> None:
        self._session = session
        self._inputs = inputs
        self._outputs = outputs

    def run(self) -> None:
        """Run the module once over the bound buffers.

        Raises:
            EngineError: If the module fails; the message names the part.
        """
        self._session.run(self._inputs, self._outputs)
