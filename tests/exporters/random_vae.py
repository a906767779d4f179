"""Small random VAEs, whose every weight matters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder


def random_vae(*, seed: int = 0, levels: int = 2, latent_channels: int = 4, **config: object) -> AutoencoderKL:
    """Make a VAE of narrow layers whose pixels are about as large as an image's."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **config,
    )
    _draw_vectors(vae)
    return vae.eval().requires_grad_(False)


def random_temporal_vae(*, seed: int = 0, levels: int = 2, **config: object) -> AutoencoderKLTemporalDecoder:
    """Make a VAE whose decoder mixes frames. Its layers have 32 norm groups, so they are wider."""
    torch.manual_seed(seed)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64, 64, 64)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        layers_per_block=2,  # with fewer, its middle block has no attention
        **config,
    )
    _draw_vectors(vae)
    for name, weight in vae.named_parameters():
        if name.endswith("mix_factor"):  # 0 at first: as much of the frame as of its neighbours
            torch.nn.init.normal_(weight, std=0.5)
    return vae.eval().requires_grad_(False)


def _draw_vectors(vae: torch.nn.Module) -> None:
    for name, weight in vae.named_parameters():
        if weight.dim() == 1 and "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(weight, mean=1.0, std=0.1)
        elif weight.dim() == 1:
            torch.nn.init.normal_(weight, std=0.1)


def write_vae(folder: Path, vae: AutoencoderKL | AutoencoderKLTemporalDecoder | None = None) -> Path:
    """Save a VAE as a pipeline's folder `vae` holds it."""
    (vae or random_vae()).save_pretrained(folder)
    return folder
