"""The reference backend: a model's own PyTorch modules behind the protocol of compiled engines.

The same runtime and policy over these parts give the policy's error alone; the difference to a compiled backend is the
engine's error. PyTorch is imported when the first session is opened, never with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adacorr_deploy.core.errors import BackendUnavailableError, EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Artefact, Buffer
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.host_backend import HostBackend
from adacorr_deploy.engines.host_memory import host_array

if TYPE_CHECKING:
    import torch


class TorchBackend(HostBackend):
    """Runs parts given as modules: part name → module whose forward takes the inputs by name.

    A module returns its outputs as a tuple in the order of the part's spec (or one tensor, if there is one output).
    """

    name: Final = "torch"
    precisions: Final = frozenset({DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16})

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self._modules = dict(modules)

    def build(self, onnx_path: Path, spec: PartSpec, artefact_dir: Path) -> Artefact:
        """Return `onnx_path` as it is: the module takes its place.

        Raises:
            EngineError: If there is no module for the part.
        """
        self._module(spec)
        return Artefact(path=onnx_path)

    def open(self, artefact: Artefact, spec: PartSpec) -> TorchSession:
        """Open the part's module; no file is read.

        Raises:
            EngineError: If there is no module for the part.
            BackendUnavailableError: If PyTorch is not installed.
        """
        return TorchSession(spec, self._module(spec))

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
        self.spec = spec
        self._module: torch.nn.Module | None = module.eval()
        self.launches = 0

    def bind(self, buffers: Mapping[str, Buffer]) -> TorchLaunch:
        """Bind every input and output: the tensors share memory with the buffers.

        Raises:
            EngineError: If a tensor is missing, doesn't fit, or an output overlaps another tensor.
        """
        import torch

        check_binding(self.spec, buffers)
        tensors = {name: torch.from_numpy(host_array(buffer)) for name, buffer in buffers.items()}
        inputs = {tensor.name: tensors[tensor.name] for tensor in self.spec.inputs}
        outputs = tuple(tensors[tensor.name] for tensor in self.spec.outputs)
        return TorchLaunch(self, inputs, outputs)

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        """Run the module, copy its results into `outputs`, and count it; `TorchLaunch.run` is the way in.

        Raises:
            EngineError: If the module fails, returns other tensors than the spec says, or the session is closed.
        """
        import torch

        if self._module is None:
            raise EngineError(f"{self.spec.name}: the session is closed. Open it again.")
        with torch.inference_mode():
            try:
                results = self._module(**inputs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise EngineError(f"{self.spec.name}: the PyTorch module failed while running: {error}") from error
            results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
            self._check_results(results, outputs)
            for bound, result in zip(outputs, results, strict=True):
                bound.copy_(result)
        self.launches += 1

    def close(self) -> None:
        """Let go of the module."""
        self._module = None

    def _check_results(self, results: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        found = [(tuple(result.shape), result.dtype) for result in results]
        wanted = [(tuple(output.shape), output.dtype) for output in outputs]
        if found != wanted:
            raise EngineError(f"{self.spec.name}: the PyTorch module returned {found}, the spec says {wanted}.")


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
