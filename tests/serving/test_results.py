"""What a client gets: files, pixels and latents of the same images, and of clips frame by frame."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.runtime.images import levels_from_pixels, pixels_from_latents
from adacorr_deploy.serving.results import image_tensors
from adacorr_deploy.serving.tensors import IMAGE_NAMES, Tensor, inputs_for, outputs_for
from tests.models import model_spec


def decoded(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Three shades of each latent pixel, of images or clips."""
    return np.repeat(pixels_from_latents(latents), 3, axis=-3)


def opened(file: bytes) -> Tensor:
    return np.asarray(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 1, 3, 4, 5)], ids=["images", "clips"])
def test_files_and_pixels_are_of_the_same_images_and_frames(shape: tuple[int, ...]) -> None:
    latents = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    tensors = image_tensors(latents, IMAGE_NAMES, decoded)
    frames = shape[2:-2]  # () of images
    assert tensors["pixels"].shape == (2, *frames, 4, 5, 3)
    assert tensors["png"].shape == tensors["png_base64"].shape == (2, *frames)
    np.testing.assert_array_equal(tensors["latents"], latents)
    np.testing.assert_array_equal(tensors["pixels"], levels_from_pixels(decoded(latents)))
    for index in np.ndindex(2, *frames):
        np.testing.assert_array_equal(opened(tensors["png"].item(index)), tensors["pixels"][index])
        assert base64.b64decode(tensors["png_base64"].item(index)) == tensors["png"].item(index)
    if frames:  # frame 1 of clip 0 is that of its latents
        np.testing.assert_array_equal(tensors["pixels"][0, 1, ..., 0], levels_from_pixels(latents[0, :, 1])[..., 0])


def test_a_model_of_clips_has_an_axis_more_where_images_are_and_nowhere_else(served_bundle: Bundle) -> None:
    images = served_bundle.manifest
    clips = images.model_copy(update={"model": model_spec(latent_shape=(1, 3, 4, 4), patch=(1, 2, 2))})
    dims = {field.name: len(field.dims) for field in (*inputs_for(clips), *outputs_for(clips))}
    assert {name: dims[name] for name in IMAGE_NAMES} == {"png": 2, "png_base64": 2, "pixels": 5, "latents": 5}
    before = {field.name: len(field.dims) for field in (*inputs_for(images), *outputs_for(images))}
    assert all(dims[name] == before[name] for name in dims.keys() & before.keys() - set(IMAGE_NAMES))
    assert {before[name] for name in ("pixels", "latents")} == {4}
