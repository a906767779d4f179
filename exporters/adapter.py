"""What a model family must offer to be exported, and the table of the families: adding one adds one entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.schedules import Schedule
from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.core.untrusted import clipped
from adacorr_deploy.exporters.dit_adapter import DiTAdapter
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.latte_adapter import LatteAdapter
from adacorr_deploy.exporters.pixart_adapter import PixArtAdapter
from adacorr_deploy.exporters.stdit_adapter import STDiTAdapter
from adacorr_deploy.exporters.weight_files import StateDict


class ExportableModel(Protocol):
    """A model with its weights."""

    @property
    def module(self) -> nn.Module:
        """The whole model as its own library runs it: the reference of every comparison."""
        ...

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the whole model's raw output for rows, by `module`'s own forward.

        Args:
            latents: (R, C, H, W) or (R, C, F, H, W) float32.
            timesteps: (R,), in training steps.
            conditions: What a request says, by the names of `core.specs.request_tensors`; the null label, or prompt,
                stands in rows without condition.

        Returns:
            The prediction, and the learned variance in as many further channels if there is one.
        """
        ...

    @property
    def learned_variance(self) -> bool: ...

    def null_prompt(self) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """Return the prompt of images without condition, embeddings (T, E) and mask (T,), if the checkpoint has it."""
        ...

    def training_schedule(self) -> Schedule:
        """The schedule that checkpoints in the family's original layout were trained with."""
        ...

    def spec(self, precision: DType, segment: int) -> ModelSpec:
        """Return what the runtime must know of it.

        Args:
            precision: Of weights and of activations between parts.
            segment: Transformer blocks in a block part; `core.specs.HALVES` makes a part of each of their units.
        """
        ...

    def modules(self, precision: DType) -> FamilyModules:
        """Return what the parts are made of; their contracts are in `precision`, as those of `spec`."""
        ...


class ModelAdapter(Protocol):
    """Builds a family's models from checkpoints, after checking every weight.

    Raises:
        CheckpointError: If the weights don't fit the model.
        UnsupportedModelError: If the model uses a feature without a compiled form.
    """

    @property
    def family(self) -> str: ...

    def from_config(
        self, config: Mapping[str, object], state: StateDict, *, where: str, pipeline: str | None = None
    ) -> ExportableModel:
        """Build the model from its diffusers configuration and weights.

        Args:
            config: The transformer's `config.json`.
            state: The weights, by diffusers' names.
            where: For the messages.
            pipeline: Class of the pipeline, where the transformer belongs to one: several may share a transformer.
        """
        ...

    def is_original(self, state: StateDict) -> bool:
        """Say whether a state dict is in the layout of the family's original code."""
        ...

    def from_original(self, state: StateDict, *, where: str, heads: int | None) -> ExportableModel: ...


# By diffusers' class names, or, where it has no class, by the original's.
EXPORTERS: Final[Mapping[str, ModelAdapter]] = {
    "DiTTransformer2DModel": DiTAdapter(),
    "LatteTransformer3DModel": LatteAdapter(),
    "PixArtTransformer2DModel": PixArtAdapter(),
    "STDiT3": STDiTAdapter(),
}
KNOWN_CLASSES: Final = f"{', '.join(EXPORTERS)}. How to add a family: adacorr_deploy/docs/families.md"  # in messages

# diffusers wrote this class, told apart by its `norm_type`, before it gave each family its own.
_LEGACY_CLASS: Final = "Transformer2DModel"
_LEGACY_CLASSES: Final[Mapping[str, str]] = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}


def adapter_for(config: Mapping[str, object], *, where: str) -> ModelAdapter:
    """Return the adapter of a diffusers `config.json`.

    Raises:
        UnsupportedModelError: If no exporter knows the class; the message lists the known ones.
    """
    name = config.get("_class_name")
    if name == _LEGACY_CLASS:
        norm_type = config.get("norm_type")
        name = _LEGACY_CLASSES.get(str(norm_type), f"{name} with norm_type {clipped(norm_type)}")
    return _adapter(name, where=where)


def check_class(name: object, *, where: str) -> None:
    """Refuse a class of diffusers' that no exporter knows, whatever its configuration.

    Raises:
        UnsupportedModelError: As `adapter_for`.
    """
    if name != _LEGACY_CLASS:  # its configuration tells what it is
        _adapter(name, where=where)


def _adapter(name: object, *, where: str) -> ModelAdapter:
    adapter = EXPORTERS.get(name) if isinstance(name, str) else None
    if adapter is None:
        raise UnsupportedModelError(f"{where}: no exporter knows the class {clipped(name)}. Known: {KNOWN_CLASSES}")
    return adapter
