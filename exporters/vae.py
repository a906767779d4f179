"""A VAE's decoder as the `decode` part: one tile of latents, of an image or of some frames of a clip → its pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.specs import DECODE_PART, DecoderSpec, DType, ModelSpec, decode_spec
from adacorr_deploy.core.untrusted import clipped
from adacorr_deploy.exporters.config_files import folder_in_pipeline, json_object
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.vae_config import ANOTHER_VAE, ImageVaeConfig, TemporalVaeConfig, VaeConfig
from adacorr_deploy.exporters.weight_files import (
    StateDict,
    checkpoint_sha256,
    require_tensors,
    state_dict_from_files,
    weight_files,
)

_Vae: TypeAlias = AutoencoderKL | AutoencoderKLTemporalDecoder

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

    def __init__(self, vae: _Vae, config: VaeConfig) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.scaling_factor = config.scaling_factor
        self.shift_factor = config.shift_factor or 0.0

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Return pixels, (f, 3, s·h, s·w) float32, about [−1, 1], of `latents` (f, C, h, w) float32."""
        moved = latents / self.scaling_factor + self.shift_factor
        return (self.decoded(moved.to(self.decoder.conv_in.weight.dtype)).float(),)

    def decoded(self, latents: Tensor) -> Tensor:
        """Return the decoder's result, (f, 3, s·h, s·w), of `latents` (f, C, h, w), both in its precision."""
        raise NotImplementedError


class ImageDecodePart(DecodePart):
    """`AutoencoderKL`: every frame is an image."""

    def __init__(self, vae: _Vae, config: VaeConfig) -> None:
        super().__init__(vae, config)
        self.post_quant_conv = vae.post_quant_conv or nn.Identity()

    def decoded(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(latents))
        return pixels


class TemporalDecodePart(DecodePart):
    """`AutoencoderKLTemporalDecoder`: the frames are those of one clip, in order, and each sees the others."""

    def decoded(self, latents: Tensor) -> Tensor:
        frames = latents.shape[0]
        none_is_an_image = latents.new_zeros(1, frames)
        pixels: Tensor = self.decoder(latents, num_frames=frames, image_only_indicator=none_is_an_image)
        return pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """A class of VAEs: its configuration, diffusers' model, and what is made of it."""

    config: type[VaeConfig]
    model: type[_Vae]
    part: type[DecodePart]

    def empty(self, config: VaeConfig) -> _Vae:
        """Return the model with its weights on the meta device."""
        with torch.device("meta"):
            return self.model(**config.model_dump(include=set(config.constructor)))


_KINDS: Final[Mapping[str, _Kind]] = {  # by diffusers' class names
    "AutoencoderKL": _Kind(config=ImageVaeConfig, model=AutoencoderKL, part=ImageDecodePart),
    "AutoencoderKLTemporalDecoder": _Kind(
        config=TemporalVaeConfig, model=AutoencoderKLTemporalDecoder, part=TemporalDecodePart
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedVae:
    """A VAE's decoder in memory, checked."""

    where: str  # its folder, for messages
    module: DecodePart
    config: VaeConfig
    sha256: str  # of the weight files

    def spec(
        self,
        model: ModelSpec,
        *,
        tile: int = DEFAULT_TILE,
        chunk: int | None = None,
        precision: DType | None = None,
    ) -> DecoderSpec:
        """Return how latents of a model are decoded.

        Args:
            model: The model.
            tile: Latent pixels, along a side, that are decoded at once, at most.
            chunk: Frames that are decoded at once, at most; by default as many as diffusers' pipelines do. Where the
                VAE mixes frames, what a frame becomes depends on it.
            precision: By default the model's, but float32 instead of float16 where the VAE's config says that it
                overflows in it (`force_upcast`).

        Raises:
            UnsupportedModelError: If the model's latents aren't the VAE's.
        """
        channels = model.latent_shape[0]
        *frames, height, width = (largest for _, _, largest in model.latents.ranges)
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
            frames=min(chunk or self.config.chunk, math.prod(frames)),
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
        UnsupportedModelError: If it is of no class of `_KINDS`, or has a feature without a compiled form.
    """
    folder = folder_in_pipeline(folder, "vae") or folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json. Give the folder of a VAE in diffusers' layout.")
    raw, where = json_object(folder / "config.json", CheckpointError), str(folder / "config.json")
    kind = _kind(raw.get("_class_name"), where=where)
    config = kind.config.checked(raw, where=where)
    files = weight_files(folder)
    state = _decoder_weights(state_dict_from_files(files))
    vae = kind.empty(config)
    expected = _decoder_weights(vae.state_dict())
    require_tensors(state, expected, where=str(folder), model="the VAE's decoder")
    vae.load_state_dict(state, assign=True, strict=False)
    return LoadedVae(
        where=str(folder),
        module=kind.part(vae, config).eval().requires_grad_(False),
        config=config,
        sha256=checkpoint_sha256(files),
    )


def _kind(name: object, *, where: str) -> _Kind:
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedModelError(
            f"{where}: _class_name is {clipped(name)}, known are {', '.join(_KINDS)}. {ANOTHER_VAE}"
        )
    return kind


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
