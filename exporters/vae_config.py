"""The configuration of diffusers' `AutoencoderKL`, validated before any module is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.untrusted import first_fault

_Width = Annotated[int, Field(ge=1, le=8192, strict=True)]
_Levels = Field(min_length=1, max_length=8)


class VaeConfig(BaseModel):
    """The fields that shape the decoder; others of a config.json (the encoder's, training's) change nothing in it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    class_name: Annotated[Literal["AutoencoderKL"], Field(alias="_class_name")]
    in_channels: _Width = 3
    out_channels: Literal[1, 3] = 3
    down_block_types: Annotated[tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...], _Levels] = (
        "DownEncoderBlock2D",
    )
    up_block_types: Annotated[tuple[Literal["UpDecoderBlock2D"], ...], _Levels] = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[_Width, ...], _Levels] = (64,)
    layers_per_block: Annotated[int, Field(ge=1, le=16, strict=True)] = 1
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latent_channels: Annotated[int, Field(ge=1, le=1024, strict=True)] = 4
    norm_num_groups: Annotated[int, Field(ge=1, le=1024, strict=True)] = 32
    scaling_factor: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)] = 0.18215
    shift_factor: Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] | None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = False  # of the file alone: diffusers' default, true, is about training in half precision
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def checked(cls, raw: Mapping[str, object], *, where: str) -> VaeConfig:
        """Validate a config.

        Raises:
            UnsupportedModelError: Naming the first field that has no compiled form, and what is allowed.
        """
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            raise UnsupportedModelError(
                f"{where}: {first_fault(error)}. Give another decoder with --vae PATH, or build with --no-vae and keep "
                "latents."
            ) from error
        levels = {len(config.down_block_types), len(config.up_block_types), len(config.block_out_channels)}
        if len(levels) > 1:
            raise UnsupportedModelError(
                f"{where}: down_block_types, up_block_types and block_out_channels have {sorted(levels)} entries, "
                "allowed is one number for all. Check the configuration."
            )
        if odd := [width for width in config.block_out_channels if width % config.norm_num_groups]:
            raise UnsupportedModelError(
                f"{where}: norm_num_groups {config.norm_num_groups} doesn't divide block_out_channels {odd[0]}. "
                "Check the configuration."
            )
        return config

    @property
    def scale(self) -> int:
        """Image pixels per latent pixel, along an axis: every level but the last doubles it."""
        return int(2 ** (len(self.block_out_channels) - 1))
