"""Latte for the exporter: from a diffusers checkpoint to parts with their contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers import LatteTransformer3DModel
from torch import Tensor

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec, PromptSpec, units_of_parts
from adacorr_deploy.exporters.adaln_single import context_bias
from adacorr_deploy.exporters.dit_original import original_schedule
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.latte import PROMPT_TOKENS, modules_of_latte
from adacorr_deploy.exporters.latte_config import LatteConfig, empty_latte
from adacorr_deploy.exporters.weight_files import StateDict, with_weights


class LatteAdapter:
    """Builds Latte models from checkpoints."""

    family = "latte"

    def from_config(
        self, config: Mapping[str, object], state: StateDict, *, where: str, pipeline: str | None = None
    ) -> LatteModel:
        model = empty_latte(LatteConfig.checked(config, where=where))
        return LatteModel(with_weights(model, state, where=where, name="LatteTransformer3DModel"))

    def is_original(self, state: StateDict) -> bool:
        """No: checkpoints of the original code are read once diffusers' converter has made a folder of them."""
        del state
        return False

    def from_original(self, state: StateDict, *, where: str, heads: int | None) -> LatteModel:
        raise UnsupportedModelError(f"{where}: Latte is read from a diffusers folder. Convert the checkpoint to one.")


@dataclass(frozen=True, slots=True)
class LatteModel:
    """A Latte with its weights, cut into parts on demand."""

    module: LatteTransformer3DModel

    @property
    def learned_variance(self) -> bool:
        return bool(self.module.out_channels == 2 * self.module.config.in_channels)

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return diffusers' own output, (R, C or 2C, F, H, W)."""
        padding = context_bias(conditions["prompt_mask"], latents.dtype)
        output: Tensor = self.module(
            latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeddings"],
            encoder_attention_mask=padding.repeat_interleave(latents.shape[2], dim=0)[:, None],
            return_dict=False,
        )[0]
        return output

    def null_prompt(self) -> None:
        """None: it was trained with an empty text in place of prompts, which its text encoder embeds."""

    def training_schedule(self) -> NoiseSchedule:
        """Return DiT's, whose diffusion code Latte was trained with."""
        return original_schedule(learned_variance=self.learned_variance)

    def spec(self, precision: DType, segment: int) -> ModelSpec:
        config, modules = self.module.config, self.modules(precision)
        channels, frames, side = config.in_channels, config.video_length, config.sample_size
        return ModelSpec(
            family=LatteAdapter.family,
            precision=precision,
            latents=LatentSpec(
                shape=(channels, frames, side, side),
                patch=(1, config.patch_size, config.patch_size),
                largest=(frames, side, side),
                smallest=(2, config.patch_size, config.patch_size),  # diffusers gives a single frame no position
            ),
            width=self.module.temp_pos_embed.shape[-1],
            conditions=ConditionSpec(
                prompt=PromptSpec(tokens=PROMPT_TOKENS, width=config.caption_channels, shared_mask=True)
            ),
            blocks=modules.block_units,
            units=units_of_parts(modules.block_units, segment),
            learned_variance=self.learned_variance,
            norm_epsilon=config.norm_eps,
        )

    def modules(self, precision: DType) -> FamilyModules:
        return modules_of_latte(self.module, precision)
