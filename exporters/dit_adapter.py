"""DiT for the exporter: from a checkpoint to parts with their contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import DiTTransformer2DModel
from torch import Tensor

from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec, units_of_parts
from adacorr_deploy.exporters.dit import UNITS, modules_of_dit
from adacorr_deploy.exporters.dit_config import DiTConfig, empty_dit
from adacorr_deploy.exporters.dit_original import diffusers_from_original, is_original_dit, original_schedule
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.weight_files import StateDict, with_weights


class DiTAdapter:
    """Builds DiT models from checkpoints."""

    family = "dit"

    def from_config(
        self, config: Mapping[str, object], state: StateDict, *, where: str, pipeline: str | None = None
    ) -> DiTModel:
        model = empty_dit(DiTConfig.checked(config, where=where))
        return DiTModel(with_weights(model, state, where=where, name="DiTTransformer2DModel"))

    def is_original(self, state: StateDict) -> bool:
        return is_original_dit(state)

    def from_original(self, state: StateDict, *, where: str, heads: int | None) -> DiTModel:
        return DiTModel(diffusers_from_original(state, where=where, heads=heads))


@dataclass(frozen=True, slots=True)
class DiTModel:
    """A DiT with its weights, cut into parts on demand."""

    module: DiTTransformer2DModel

    @property
    def learned_variance(self) -> bool:
        return bool(self.module.out_channels == 2 * self.module.config.in_channels)

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return diffusers' own output, (R, C or 2C, H, W)."""
        labels = conditions["labels"]
        output: Tensor = self.module(latents, timestep=timesteps, class_labels=labels, return_dict=False)[0]
        return output

    def null_prompt(self) -> None:
        """Return nothing: it takes labels."""

    def training_schedule(self) -> NoiseSchedule:
        return original_schedule(learned_variance=self.learned_variance)

    def spec(self, precision: DType, segment: int) -> ModelSpec:
        config, blocks = self.module.config, (UNITS,) * len(self.module.transformer_blocks)
        return ModelSpec(
            family=DiTAdapter.family,
            precision=precision,
            latents=LatentSpec(
                shape=(config.in_channels, config.sample_size, config.sample_size),
                patch=(config.patch_size, config.patch_size),
            ),
            width=self.module.inner_dim,
            conditions=ConditionSpec(num_classes=config.num_embeds_ada_norm),
            blocks=blocks,
            units=units_of_parts(blocks, segment),
            learned_variance=self.learned_variance,
        )

    def modules(self, precision: DType) -> FamilyModules:
        del precision  # that of the weights
        return modules_of_dit(self.module)
