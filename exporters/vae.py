"""A VAE's decoder as the `decode` part: one tile of latents of one image → its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.specs import DECODE_PART, DecoderSpec, DType, ModelSpec, decode_spec
from adacorr_deploy.exporters.config_files import json_object
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.vae_config import VaeConfig
from adacorr_deploy.exporters.weight_files import (
    StateDict,
    checkpoint_sha256,
    require_tensors,
    state_dict_from_files,
    weight_files,
)

DEFAULT_TILE: Final = 64  # latent pixels: 512 of the image, the largest that many VAEs were trained on
MIN_TILE: Final = 8  # below which an overlap is no seam's worth

_WEIGHTS: Final = ("decoder.", "post_quant_conv.")  # of a decoder; the encoder's and quant_conv's stay where they are
# Names of the attention's weights in checkpoints of before 2023, which DiT's own pipelines still have.
_RENAMED: Final[Mapping[str, str]] = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class DecodePart(nn.Module):
    """Latents as the sampler leaves them → pixels, in the arithmetic of diffusers' pipelines."""

    def __init__(self, vae: AutoencoderKL, *, scaling_factor: float, shift_factor: float) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv if vae.post_quant_conv is not None else nn.Identity()
        self.decoder = vae.decoder
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Return pixels, (1, 3, s·h, s·w) float32, about [−1, 1], of `latents` (1, C, h, w) float32."""
        moved = latents / self.scaling_factor + self.shift_factor
        pixels: Tensor = self.decoder(self.post_quant_conv(moved.to(self.decoder.conv_in.weight.dtype)))
        return (pixels.float(),)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedVae:
    """A VAE's decoder in memory, checked."""

    where: str  # its folder, for messages
    module: DecodePart
    config: VaeConfig
    sha256: str  # of the weight files

    def spec(self, model: ModelSpec, *, tile: int = DEFAULT_TILE, precision: DType | None = None) -> DecoderSpec:
        """Return how latents of a model are decoded.

        Args:
            model: The model.
            tile: Latent pixels, along a side, that are decoded at once, at most.
            precision: By default the model's, but float32 instead of float16 where the VAE's config says that it
                overflows in it (`force_upcast`).

        Raises:
            UnsupportedModelError: If the model's latents aren't the VAE's.
        """
        channels, *_, height, width = model.latent_shape
        if channels != self.config.latent_channels:
            raise UnsupportedModelError(
                f"{self.where}: this VAE decodes latents of {self.config.latent_channels} channels, the model's have "
                f"{channels}. Give the VAE that the model was trained with by --vae PATH, or build with --no-vae."
            )
        overflows = self.config.force_upcast and model.precision is DType.FLOAT16
        return DecoderSpec(
            precision=precision or (DType.FLOAT32 if overflows else model.precision),
            tile=(min(tile, height), min(tile, width)),
            overlap=min(tile, height, width) // 4,  # as diffusers'; a request may ask for more than one tile
            scale=self.config.scale,
            channels=self.config.out_channels,
            vae_sha256=self.sha256,
        )

    def part(self, model: ModelSpec, decoder: DecoderSpec) -> Part:
        """Return the decoder as a part."""
        return Part(spec=decode_spec(model, decoder), module=self.module, structure=DECODE_PART)


def load_vae(folder: Path) -> LoadedVae:
    """Load the decoder of a local VAE in diffusers' layout. Nothing is fetched, and no code in it is run.

    Args:
        folder: Holds config.json and the weights: the `vae` of a pipeline's folder. The pipeline's folder will do too.

    Raises:
        CheckpointError: If weights are missing, truncated, unsafe, or don't fit the configuration.
        UnsupportedModelError: If it is no AutoencoderKL, or one with a feature that has no compiled form.
    """
    if (folder / "model_index.json").exists() and (folder / "vae").is_dir():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json. Give the folder of a VAE in diffusers' layout.")
    config = VaeConfig.checked(json_object(folder / "config.json", CheckpointError), where=str(folder / "config.json"))
    files = weight_files(folder)
    state = _decoder_weights(state_dict_from_files(files))
    vae = _empty_vae(config)
    expected = _decoder_weights(vae.state_dict())
    require_tensors(state, expected, where=str(folder), model="AutoencoderKL's decoder")
    vae.load_state_dict(state, assign=True, strict=False)
    module = DecodePart(vae, scaling_factor=config.scaling_factor, shift_factor=config.shift_factor or 0.0)
    return LoadedVae(
        where=str(folder),
        module=module.eval().requires_grad_(False),
        config=config,
        sha256=checkpoint_sha256(files),
    )


def _decoder_weights(state: StateDict) -> StateDict:
    weights = {_present_name(name): value for name, value in state.items() if name.startswith(_WEIGHTS)}
    # What is now a linear layer was then a 1 × 1 convolution.
    return {
        name: value[:, :, 0, 0] if ".attentions." in name and value.dim() == 4 else value
        for name, value in weights.items()
    }


def _present_name(name: str) -> str:
    if ".attentions." in name:
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
    return name


def _empty_vae(config: VaeConfig) -> AutoencoderKL:
    """Return the model with its weights on the meta device."""
    with torch.device("meta"):
        return AutoencoderKL(
            **config.model_dump(
                include={
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
        )
