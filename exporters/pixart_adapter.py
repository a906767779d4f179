"""PixArt-α and Σ for the exporter: from a checkpoint to parts with their contracts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec, PromptSpec, units_of_parts
from adacorr_deploy.exporters.dit_original import original_schedule
from adacorr_deploy.exporters.family_parts import FamilyModules
from adacorr_deploy.exporters.pixart import PIXELS_PER_LATENT, UNITS, modules_of_pixart
from adacorr_deploy.exporters.pixart_config import PixArtConfig, empty_pixart
from adacorr_deploy.exporters.weight_files import StateDict, with_weights

# Tokens that diffusers' pipelines pad prompts to. A mask hides the padding, so a longer one changes no result.
PROMPT_TOKENS: Final[Mapping[str, int]] = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
# Sides of an image, in those that the model was trained with: the pipelines' aspect ratios end at 4.
_LARGEST: Final = 2


class PixArtAdapter:
    """Builds PixArt models from checkpoints."""

    family = "pixart"

    def from_config(
        self, config: Mapping[str, object], state: StateDict, *, where: str, pipeline: str | None = None
    ) -> PixArtModel:
        model = empty_pixart(PixArtConfig.checked(config, where=where))
        model = with_weights(model, state, where=where, name="PixArtTransformer2DModel")
        tokens = PROMPT_TOKENS.get(pipeline or "", max(PROMPT_TOKENS.values()))
        return PixArtModel(module=model, prompt_tokens=tokens)

    def is_original(self, state: StateDict) -> bool:
        return "y_embedder.y_proj.fc1.weight" in state and "blocks.0.scale_shift_table" in state

    def from_original(self, state: StateDict, *, where: str, heads: int | None) -> NoReturn:
        raise UnsupportedModelError(
            f"{where} is a PixArt checkpoint in its original layout, which isn't read; allowed is diffusers' folder. "
            "Convert it with diffusers' scripts/convert_pixart_sigma_to_diffusers.py (or …_alpha_…)."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PixArtModel:
    """A PixArt with its weights, cut into parts on demand."""

    module: PixArtTransformer2DModel
    prompt_tokens: int  # T
    learned_variance: Final = False  # as in diffusers' pipelines: what the checkpoints predict of it is not used

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return diffusers' own output, (R, C, H, W)."""
        sizes = {}
        if self.module.use_additional_conditions:
            resolution = PIXELS_PER_LATENT * torch.tensor([latents.shape[2:]], dtype=torch.float32)
            resolution = resolution.expand(len(latents), -1)
            sizes = {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}
        output: Tensor = self.module(
            latents,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeddings"],
            encoder_attention_mask=conditions["prompt_mask"],
            added_cond_kwargs=sizes or None,
            return_dict=False,
        )[0]
        return output[:, : self.module.config.in_channels]

    def null_prompt(self) -> None:
        """None: rows without condition take the empty prompt's embeddings, which no PixArt checkpoint holds."""

    def training_schedule(self) -> NoiseSchedule:
        """Return DiT's, which PixArt was trained with too."""
        return original_schedule(learned_variance=self.learned_variance)

    def spec(self, precision: DType, segment: int) -> ModelSpec:
        config, blocks = self.module.config, (UNITS,) * len(self.module.transformer_blocks)
        return ModelSpec(
            family=PixArtAdapter.family,
            precision=precision,
            latents=LatentSpec(
                shape=(config.in_channels, config.sample_size, config.sample_size),
                patch=(config.patch_size, config.patch_size),
                largest=(_LARGEST * config.sample_size,) * 2,
            ),
            width=self.module.inner_dim,
            conditions=ConditionSpec(prompt=PromptSpec(tokens=self.prompt_tokens, width=self._prompt_width)),
            blocks=blocks,
            units=units_of_parts(blocks, segment),
            learned_variance=self.learned_variance,
            norm_epsilon=config.norm_eps,
        )

    def modules(self, precision: DType) -> FamilyModules:
        return modules_of_pixart(self.module, precision=precision, prompt_tokens=self.prompt_tokens)

    @property
    def _prompt_width(self) -> int:
        width: int = self.module.config.caption_channels or self.module.config.cross_attention_dim
        return width
