"""The head part of every family: final layer, unpatchify, guidance and the sampler's update."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from adacorr_deploy.exporters.sampler_update import sampler_update


class HeadPart(nn.Module):
    """Tokens → the next latents, of images or clips."""

    def __init__(
        self,
        norm: nn.Module,
        projection: nn.Linear,
        *,
        patch: Sequence[int],
        channels: int,
        uses_variance: bool = True,
    ) -> None:
        """Take a model's final layer.

        Args:
            norm: Of the tokens, before they are scaled and shifted.
            projection: Tokens → patches; their numbers in the order of the patch's axes, then the output's channels.
            patch: (p, p), or (1, p, p) of a clip: as `LatentSpec.patch`.
            channels: C of the latents. The projection has as many channels, or more: then a learned variance follows
                in as many, and what comes after is not used.
            uses_variance: Whether samplers are given a learned variance, or there may as well be none.
        """
        super().__init__()
        self.norm_out = norm
        self.proj_out = projection
        self.patch = tuple(patch)
        self.channels = channels
        self.uses_variance = uses_variance
        self.out_channels = projection.out_features // math.prod(patch)

    def forward(
        self,
        tokens: Tensor,
        modulation: Tensor,
        step: Tensor,
        latents: Tensor,
        guidance: Tensor,
        coefficients: Tensor,
        noise: Tensor,
        carried: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the next latents, the guided model output and what the next step is given, all float32.

        Args:
            tokens: (R, N, D).
            modulation: (S, R, 2, D): shift, scale.
            step: (1,) int64, the row of `modulation` and `coefficients` to use.
            latents: (B, C, H, W) or (B, C, F, H, W) float32, as the results, `noise` and `carried`.
            guidance: (K, B) float32, weights of the branches.
            coefficients: (S, 8) float32, a sampler's table.
            noise: Standard normals.
            carried: From the step before.
        """
        shift, scale = modulation.index_select(0, step).squeeze(0).chunk(2, dim=1)
        patches = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        size = latents.shape[2:]
        output = self._unpatchify(patches, size).float().reshape(*guidance.shape, self.out_channels, *size)
        weights = guidance[(..., *(None for _ in (self.out_channels, *size)))]
        guided = (weights * output[:, :, : self.channels]).sum(dim=0)
        # The variance is that of the conditional rows, which come first.
        learned = self.uses_variance and self.out_channels > self.channels
        variance = output[0, :, self.channels : 2 * self.channels] if learned else None
        row = coefficients.index_select(0, step)
        latents_out, carried_out = sampler_update(row, latents, guided, noise, carried, variance)
        return latents_out, guided, carried_out

    def _unpatchify(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """Return (R, C, H, W) or (R, C, F, H, W) of patches (R, N, p·p·C)."""
        grid = [length // patch for length, patch in zip(size, self.patch, strict=True)]
        axes = len(grid)
        pixels = patches.reshape(-1, *grid, *self.patch, self.out_channels)
        order = [place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)]
        return pixels.permute(0, 1 + 2 * axes, *order).reshape(-1, self.out_channels, *size)
