"""The configurations of diffusers' VAEs, validated before any module is built from them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from adacorr_deploy.exporters.model_config import Count, ModelConfig

_Width = Annotated[int, Field(ge=1, le=8192, strict=True)]
_Levels = Field(min_length=1, max_length=8)
ANOTHER_VAE: Final = "Give another decoder with --vae PATH, or build with --no-vae and keep latents."


class VaeConfig(ModelConfig):
    """The fields that shape a decoder; others of a config.json (the encoder's, training's) change nothing in it."""

    otherwise: ClassVar[str] = ANOTHER_VAE

    chunk: ClassVar[int]  # frames that are decoded at once, at most, where nothing else is asked for
    constructor: ClassVar[frozenset[str]]  # fields that diffusers' class takes

    in_channels: _Width = 3
    out_channels: Literal[1, 3] = 3
    down_block_types: Annotated[tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...], _Levels] = (
        "DownEncoderBlock2D",
    )
    block_out_channels: Annotated[tuple[_Width, ...], _Levels] = (64,)
    layers_per_block: Annotated[int, Field(ge=1, le=16, strict=True)] = 1
    latent_channels: Count = 4
    norm_num_groups: Count = 32
    scaling_factor: Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)] = 0.18215
    shift_factor: Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] | None = None
    force_upcast: bool = False  # of the file alone: diffusers' default, true, is about training in half precision

    @property
    def scale(self) -> int:
        """Image pixels per latent pixel, along an axis: every level but the last doubles it."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def refusal(self) -> str | None:
        levels = {len(types) for types in self._levels()}
        if len(levels) > 1:
            return (
                f"down_block_types, up_block_types and block_out_channels have {sorted(levels)} entries, allowed is "
                "one number for all"
            )
        if odd := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            return f"norm_num_groups {self.norm_num_groups} doesn't divide block_out_channels {odd[0]}"
        return None

    def _levels(self) -> tuple[tuple[object, ...], ...]:
        """Return the fields that have an entry for each level."""
        return self.down_block_types, self.block_out_channels


class ImageVaeConfig(VaeConfig):
    """Of `AutoencoderKL`, which decodes every frame by itself."""

    chunk: ClassVar[int] = 1
    constructor: ClassVar[frozenset[str]] = frozenset(
        {
            "in_channels",
            "out_channels",
            "down_block_types",
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
            "act_fn",
            "latent_channels",
            "norm_num_groups",
            "use_post_quant_conv",
            "mid_block_add_attention",
        }
    )

    up_block_types: Annotated[tuple[Literal["UpDecoderBlock2D"], ...], _Levels] = ("UpDecoderBlock2D",)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latents_mean: None = None
    latents_std: None = None
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def _levels(self) -> tuple[tuple[object, ...], ...]:
        return self.down_block_types, self.up_block_types, self.block_out_channels


class TemporalVaeConfig(VaeConfig):
    """Of `AutoencoderKLTemporalDecoder`, whose decoder mixes the frames that it is given together."""

    chunk: ClassVar[int] = 14  # as diffusers' video pipelines, so that frames have the neighbours that they have there
    constructor: ClassVar[frozenset[str]] = frozenset(
        {
            "in_channels",
            "out_channels",
            "down_block_types",
            "block_out_channels",
            "layers_per_block",
            "latent_channels",
        }
    )

    norm_num_groups: Literal[32] = 32  # of all its layers, written in the class
