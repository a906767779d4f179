"""What a request says of its images beside labels, and all of it as the rows that parts take."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSize, LatentSpec
from adacorr_deploy.core.shapes import FRAMES
from adacorr_deploy.core.specs import ModelSpec, PromptSpec
from adacorr_deploy.core.untrusted import clipped

if TYPE_CHECKING:
    from adacorr_deploy.runtime.request import SampleRequest

Arrays = dict[str, NDArray[np.generic]]

MAX_FRAME_RATE: Final = 1000.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """Prompts as a model's text encoder gives them, one per image.

    Attributes:
        embeddings: (B, T, E) float32, padded to the model's T.
        mask: (B, T) int64: 1 where a token is real, 0 where it is padding.
        negative: Of the rows without condition, one for each image or one for all; None: the bundle's null prompt.
    """

    embeddings: NDArray[np.float32]
    mask: NDArray[np.int64]
    negative: Prompts | None = None

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def sha256(self) -> str:
        """Tells prompts from others."""
        digest = hashlib.sha256(self.embeddings.tobytes() + self.mask.tobytes())
        if self.negative is not None:
            digest.update(self.negative.sha256.encode())
        return digest.hexdigest()

    def taken(self, images: Sequence[int]) -> Prompts:
        """Return the prompts of images by their numbers, which go round those that there are."""
        index = np.asarray(images) % len(self)
        negative = self.negative
        if negative is not None and len(negative) == len(self):
            negative = negative.taken(images)
        return Prompts(embeddings=self.embeddings[index], mask=self.mask[index], negative=negative)


def prompts_from_null(null: tuple[NDArray[np.float32], NDArray[np.int64]] | None) -> Prompts | None:
    """Return the null prompt, embeddings (T, E) and mask (T,), as prompts for all images; None stays None."""
    return None if null is None else Prompts(embeddings=null[0][None], mask=null[1][None])


def check_conditions(request: SampleRequest, model: ModelSpec) -> None:
    """Refuse prompts, a size or a frame rate that the model doesn't take, or lacks.

    Raises:
        RequestError: Saying what was given, and what is allowed.
    """
    prompt, prompts = model.conditions.prompt, request.prompts
    if prompt is None and prompts is not None:
        raise RequestError("prompts are given, and this model takes none. Leave them out.")
    if prompt is not None and prompts is None:
        raise RequestError(
            f"prompts is missing: this model takes embeddings of {prompt.tokens} tokens of width {prompt.width}, and "
            "their mask, for each image."
        )
    if prompt is not None and prompts is not None:
        check_prompts(prompts, prompt)
        if prompts.negative is not None:
            check_prompts(prompts.negative, prompt, name="prompts.negative")
            if len(prompts.negative) not in (1, request.batch):
                raise RequestError(
                    f"prompts.negative holds {len(prompts.negative)} prompts, allowed are 1 for all images, or "
                    f"{request.batch}."
                )
    _check_frame_rate(request.frame_rate, model)
    if request.size is not None:
        check_latent_size(request.size, model.latents)


def check_prompts(prompts: Prompts, spec: PromptSpec, *, name: str = "prompts") -> None:
    """Refuse prompts that are not of a model's shape.

    Raises:
        RequestError: If an array has another shape or type, or holds what is not finite, or no real token.
    """
    shape = (spec.tokens, spec.width)
    for array, dtype, wanted in ((prompts.embeddings, np.float32, shape), (prompts.mask, np.int64, shape[:1])):
        what = "embeddings" if dtype is np.float32 else "mask"
        given: object = array  # an untyped caller may pass anything
        if not isinstance(given, np.ndarray) or array.dtype != dtype or array.shape[1:] != wanted or not len(array):
            given = f"{array.dtype} {array.shape}" if isinstance(given, np.ndarray) else type(given).__name__
            sizes = ", ".join(("B", *map(str, wanted)))
            raise RequestError(f"{name}.{what} is {given}, allowed is a {dtype.__name__} array of shape ({sizes}).")
    if len(prompts.embeddings) != len(prompts.mask):
        raise RequestError(
            f"{name}: there are {len(prompts.embeddings)} embeddings and {len(prompts.mask)} masks. Give one of each "
            "for each image."
        )
    if bad := int(np.size(prompts.embeddings) - np.isfinite(prompts.embeddings).sum()):
        raise RequestError(f"{name}.embeddings holds {bad} values that are NaN or infinite. Give finite numbers only.")
    if not np.isin(prompts.mask, (0, 1)).all() or not prompts.mask.any(axis=1).all():
        raise RequestError(f"{name}.mask holds other numbers than 0 and 1, or a prompt without a real token.")


def check_latent_size(size: LatentSize, latents: LatentSpec) -> None:
    """Refuse a size that a model's latents can't have.

    Raises:
        RequestError: If an axis is missing, out of range, or no multiple of the patch.
    """
    axes = ", ".join(latents.axes)
    given: object = size  # an untyped caller may pass anything
    numbers = isinstance(given, (tuple, list)) and all(isinstance(each, (int, np.integer)) for each in given)
    if not numbers or len(size) != len(latents.axes) or any(isinstance(each, bool) for each in size):
        raise RequestError(f"size is {clipped(size)}, allowed are whole numbers of latent pixels: ({axes}).")
    for (name, low, high), patch, length in zip(latents.ranges, latents.patch, size, strict=True):
        if not low <= length <= high or length % patch:
            allowed = f"{low} … {high}, in multiples of {patch}" if low < high else f"{low} alone"
            raise RequestError(f"size: {name} is {length} latent pixels, this model takes {allowed}.")


def condition_rows(request: SampleRequest, model: ModelSpec, null_prompt: Prompts | None) -> Arrays:
    """Return what the runtime knows of a checked request, by the names of `core.specs.request_tensors`.

    Timesteps are not among it: they are the sampler's.

    Args:
        request: Checked.
        model: Says what it takes.
        null_prompt: The bundle's, (1, T, E), of rows without condition where the request has none; or None.

    Raises:
        RequestError: If there are such rows, and neither the request nor the bundle has a prompt for them.
    """
    _, *size = model.latents.shape_at(request.size)
    frames, height, width = [1, *size][-3:]
    rows: Arrays = {"latent_size": np.asarray([frames, height, width], dtype=np.float32)}
    if model.num_classes:
        rows["labels"] = request.rows(model.num_classes)
    if request.prompts is not None:
        rows |= _prompt_rows(request, request.prompts, null_prompt)
        if model.conditions.prompt is not None and model.conditions.prompt.shared_mask:
            rows["prompt_mask"] = np.tile(request.prompts.mask, (request.branches, 1))
    if model.conditions.frame_rate:
        rows["frame_rate"] = np.full(request.batch * request.branches, request.frame_rate, dtype=np.float32)
    if FRAMES in model.latents.axes:
        rows["frame_positions"] = np.arange(frames, dtype=np.float32)
    return rows


def _prompt_rows(request: SampleRequest, prompts: Prompts, null_prompt: Prompts | None) -> Arrays:
    parts = [prompts]
    if request.branches > 1:
        parts.append(_negative(prompts, null_prompt))
    counts = [request.batch // len(part) for part in parts]
    return {
        "prompt_embeddings": np.concatenate(
            [np.repeat(part.embeddings, count, axis=0) for part, count in zip(parts, counts, strict=True)]
        ),
        "prompt_mask": np.concatenate(
            [np.repeat(part.mask, count, axis=0) for part, count in zip(parts, counts, strict=True)]
        ),
    }


def _negative(prompts: Prompts, null_prompt: Prompts | None) -> Prompts:
    negative = prompts.negative if prompts.negative is not None else null_prompt
    if negative is None:
        raise RequestError(
            "guidance needs a prompt for the images without condition, and the bundle holds none. Give "
            "prompts.negative, usually the embeddings of an empty text, or guidance 1."
        )
    return negative


def check_negative(request: SampleRequest, *, has_null_prompt: bool) -> None:
    """Refuse guidance on prompts that nobody gives the negative of.

    Raises:
        RequestError: As `condition_rows` would.
    """
    if request.prompts is not None and request.branches > 1 and not has_null_prompt:
        _negative(request.prompts, None)


def _check_frame_rate(frame_rate: float | None, model: ModelSpec) -> None:
    if not model.conditions.frame_rate:
        if frame_rate is not None:
            raise RequestError("frame_rate is given, and this model takes none. Leave it out.")
        return
    given: object = frame_rate  # an untyped caller may pass anything
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= MAX_FRAME_RATE:
        raise RequestError(f"frame_rate is {clipped(given)}, allowed is more than 0, at most {MAX_FRAME_RATE:g}.")
