"""Open-Sora's STDiT for the exporter: from an original checkpoint to parts with their contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.schedules import FlowSchedule
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec, PromptSpec, units_of_parts
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.stdit import NORM_EPSILON, STDiT
from adacorr_deploy.exporters.stdit_original import is_original_stdit, original_schedule, stdit_from_original
from adacorr_deploy.exporters.stdit_parts import modules_of_stdit
from adacorr_deploy.exporters.weight_files import StateDict

# 51 frames of 240 × 432 pixels, Open-Sora's example: its VAE makes 5 latent frames of 17.
_DEFAULT_SIZE: Final = (15, 30, 54)
_LARGEST: Final = (120, 160, 160)  # 408 frames (16 s), 1280 pixels either way: what Open-Sora 1.2 makes at most


class STDiTAdapter:
    """Builds STDiT models from checkpoints."""

    family = "stdit"

    def from_config(
        self, config: Mapping[str, object], state: StateDict, *, where: str, pipeline: str | None = None
    ) -> STDiTModel:
        raise UnsupportedModelError(f"{where}: diffusers has no STDiT. Give the weights' file of Open-Sora itself.")

    def is_original(self, state: StateDict) -> bool:
        return is_original_stdit(state)

    def from_original(self, state: StateDict, *, where: str, heads: int | None) -> STDiTModel:
        return STDiTModel(stdit_from_original(state, where=where, heads=heads))


@dataclass(frozen=True, slots=True)
class STDiTModel:
    """An STDiT with its weights, cut into parts on demand."""

    module: STDiT
    default_size: tuple[int, int, int] = _DEFAULT_SIZE  # latent frames, height, width of requests that ask for none

    @property
    def learned_variance(self) -> bool:
        """False: rectified flow has none, though the original's last layer leaves room for one."""
        return False

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the module's velocity (R, C, F, H, W), with the sign that flow matching has elsewhere."""
        names = ("prompt_embeddings", "prompt_mask", "frame_rate")
        output: Tensor = self.module(latents, timesteps, *(conditions[name] for name in names))
        return -output[:, : self.module.size.channels]

    def null_prompt(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return what the model was trained with in place of prompts; it is as long as each prompt."""
        embeddings: NDArray[np.float32] = self.module.y_embedder.y_embedding.float().numpy()
        return embeddings, np.ones(len(embeddings), dtype=np.int64)

    def training_schedule(self) -> FlowSchedule:
        return original_schedule(self.module)

    def spec(self, precision: DType, segment: int) -> ModelSpec:
        size, modules = self.module.size, self.modules(precision)
        return ModelSpec(
            family=STDiTAdapter.family,
            precision=precision,
            latents=LatentSpec(
                shape=(size.channels, *_whole_patches(self.default_size, size.patch)),
                patch=(1, size.patch, size.patch),
                largest=_whole_patches(_LARGEST, size.patch),
            ),
            width=size.width,
            conditions=ConditionSpec(
                prompt=PromptSpec(tokens=size.prompt_tokens, width=size.prompt_width, shared_mask=True), frame_rate=True
            ),
            blocks=modules.block_units,
            units=units_of_parts(modules.block_units, segment),
            learned_variance=self.learned_variance,
            norm_epsilon=NORM_EPSILON,
        )

    def modules(self, precision: DType) -> FamilyModules:
        return modules_of_stdit(self.module, precision)


def _whole_patches(size: tuple[int, int, int], patch: int) -> tuple[int, int, int]:
    """Return the smallest size of whole patches that holds `size`, frames, height and width."""
    frames, height, width = size
    return frames, -(-height // patch) * patch, -(-width // patch) * patch
