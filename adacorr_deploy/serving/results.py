"""From what was sampled to a response's tensors."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.runtime import SampleResult
from adacorr_deploy.runtime.images import levels_from_pixels, picture_from_pixels, png_from_picture
from adacorr_deploy.serving.tensors import Tensor, text_tensor

ImagesOfLatents = Callable[
    [NDArray[np.float32]], NDArray[np.float32]
]  # latents → pixels in [−1, 1]: (B, C, H, W), or (B, F, C, H, W)
JsonValue = str | int | float | bool | None


def result_tensors(
    result: SampleResult, *, images: ImagesOfLatents, outputs: Sequence[str], policy: str, queue_seconds: float
) -> dict[str, Tensor]:
    """Return a finished request's tensors: the images that were wanted, and what it took.

    Raises:
        EngineError: If the latents can't be decoded.
    """
    return {
        **image_tensors(result.latents, outputs, images),
        "rho": np.array([result.rho], dtype=np.float64),
        "launches": np.array([result.launches], dtype=np.int64),
        "steps": np.array([result.steps], dtype=np.int64),
        "seconds": np.array([result.seconds], dtype=np.float64),
        "queue_seconds": np.array([queue_seconds], dtype=np.float64),
        "policy": text_tensor([policy]),
    }


def image_tensors(latents: NDArray[np.float32], outputs: Sequence[str], images: ImagesOfLatents) -> dict[str, Tensor]:
    """Return latents, (B, C, H, W) or (B, C, F, H, W), in the forms of `outputs`, names of `tensors.IMAGES`.

    They are decoded only if need be. Pixels and files of clips have an axis of frames after the batch's.
    """
    tensors: dict[str, Tensor] = {}
    if "latents" in outputs:
        tensors["latents"] = latents
    if set(outputs) <= {"latents"}:
        return tensors
    pixels = images(latents)
    if "pixels" in outputs:
        tensors["pixels"] = levels_from_pixels(pixels)
    if "png" in outputs or "png_base64" in outputs:
        *batch, channels, height, width = pixels.shape  # (B,), or (B, F) of clips
        images_or_frames = pixels.reshape(-1, channels, height, width)
        files = [png_from_picture(picture_from_pixels(image)) for image in images_or_frames]
        if "png" in outputs:
            tensors["png"] = text_tensor(files).reshape(batch)
        if "png_base64" in outputs:
            tensors["png_base64"] = text_tensor(base64.b64encode(file) for file in files).reshape(batch)
    return tensors


def event_tensor(kind: str, values: Mapping[str, JsonValue]) -> NDArray[np.object_]:
    """Return an event as one JSON text."""
    return text_tensor([json.dumps({"type": kind, **values}, allow_nan=False)])
