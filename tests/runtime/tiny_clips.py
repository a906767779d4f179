"""The tiny DiT over clips: four frames of 2 × 2, a token each, where the image had four patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.shapes import BATCH
from adacorr_deploy.core.specs import PartSpec, TensorSpec
from tests.models import model_spec
from tests.runtime.tiny_dit import SIDE, UNITS, WIDTH, Part, TinyDiT

FRAMES: Final = 4
_CLIP: Final = (FRAMES, 2, 2)

Tensors = Mapping[str, NDArray[np.generic]]


class TinyClips(TinyDiT):
    """The same mathematics; a clip's frames are the image's patches, row by row."""

    def __init__(self, *, seed: int = 0, units: tuple[int, ...] = UNITS) -> None:
        super().__init__(seed=seed, units=units)
        self.spec = model_spec(latent_shape=(1, *_CLIP), patch=(1, 2, 2), width=WIDTH, num_classes=3, units=units)

    def parts(self) -> dict[str, tuple[PartSpec, Part]]:
        parts = super().parts()
        return {name: _over_clips(*part) if name in ("embed", "head") else part for name, part in parts.items()}


def _over_clips(spec: PartSpec, function: Part) -> tuple[PartSpec, Part]:
    image = (BATCH, 1, SIDE, SIDE)

    def of_clips(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, shape=(BATCH, 1, *_CLIP)) if tensor.shape == image else tensor

    changed = replace(spec, inputs=tuple(map(of_clips, spec.inputs)), outputs=tuple(map(of_clips, spec.outputs)))
    images = {tensor.name for tensor in (*spec.inputs, *spec.outputs) if tensor.shape == image}

    def called(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        given = {
            name: _exchanged(value, (1, SIDE, SIDE)) if name in images else value for name, value in tensors.items()
        }
        made = function(given)
        return {name: _exchanged(value, (1, *_CLIP)) if name in images else value for name, value in made.items()}

    return changed, called


def _exchanged(values: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Turn an image of 2 × 2 patches into a clip of them, or back."""
    return values.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, *shape)
