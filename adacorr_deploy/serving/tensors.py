"""The tensors of a request and of its response: one table, from which the server's configuration is written too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.shapes import FRAMES, HEIGHT, WIDTH

Tensor = NDArray[np.generic] | NDArray[np.object_]
Tensors = Mapping[str, Tensor]
Field = int | float | str | list[int] | list[str] | NDArray[np.float32] | NDArray[np.int64]

ANY: Final = -1  # an axis of any size, as Triton writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorField:
    """One tensor, as clients see it.

    Attributes:
        name: Also the key in JSON, where a request comes as such.
        datatype: Triton's name, without `TYPE_`.
        dims: Sizes; (1,) is a single value, and so are the rows of anything longer.
    """

    name: str
    datatype: str
    dims: tuple[int, ...] = (1,)

    @property
    def single(self) -> bool:
        return self.dims == (1,)


# Every input is optional: what is not given has its default. Whole numbers and text take the widest type, so that no
# value is changed on its way; guidance too, as a calibration is found by it.
INPUTS: Final = (
    TensorField(name="class_labels", datatype="INT64", dims=(ANY,)),  # one per image
    TensorField(name="prompts", datatype="STRING", dims=(ANY,)),  # one per image, of models that take text
    TensorField(name="negative_prompts", datatype="STRING", dims=(ANY,)),  # one for all images, or one for each
    TensorField(name="prompt_embeddings", datatype="FP32", dims=(ANY, ANY, ANY)),  # in place of prompts: (B, T, E)
    TensorField(name="prompt_mask", datatype="INT64", dims=(ANY, ANY)),  # (B, T), 1 where a token is real
    TensorField(name="negative_embeddings", datatype="FP32", dims=(ANY, ANY, ANY)),
    TensorField(name="negative_mask", datatype="INT64", dims=(ANY, ANY)),
    TensorField(name="size", datatype="INT64", dims=(2,)),  # pixels: width and height
    TensorField(name="frames", datatype="INT64"),
    TensorField(name="frame_rate", datatype="FP64"),
    TensorField(name="seed", datatype="UINT64"),
    TensorField(name="steps", datatype="INT64"),
    TensorField(name="guidance", datatype="FP64"),
    TensorField(name="sampler", datatype="STRING"),
    TensorField(name="eta", datatype="FP64"),
    TensorField(name="policy", datatype="STRING"),  # a preset, one with a target, or a file of the repository
    TensorField(name="quality", datatype="STRING"),  # in place of a policy: exact, balanced or fast
    TensorField(name="latents", datatype="FP32", dims=(ANY, ANY, ANY, ANY)),  # initial, in place of drawn ones
    TensorField(name="outputs", datatype="STRING", dims=(ANY,)),
    TensorField(name="timeout_ms", datatype="INT64"),
    TensorField(name="preview_every", datatype="INT64"),  # steps, for streams
    TensorField(name="command", datatype="STRING"),
    TensorField(name="stream", datatype="STRING"),
    TensorField(name="after_step", datatype="INT64"),
)

IMAGES: Final = (
    TensorField(name="png", datatype="STRING", dims=(ANY,)),  # one file per image
    TensorField(name="png_base64", datatype="STRING", dims=(ANY,)),  # the same for JSON, which holds no bytes
    TensorField(name="pixels", datatype="UINT8", dims=(ANY, ANY, ANY, ANY)),  # (B, H, W, C), 0 … 255
    TensorField(name="latents", datatype="FP32", dims=(ANY, ANY, ANY, ANY)),  # (B, C, H, W)
)
FACTS: Final = (  # in tensors, since Triton 24.10 lets a Python model give no response parameters
    TensorField(name="rho", datatype="FP64"),  # share of block launches skipped, 0 … 1
    TensorField(name="launches", datatype="INT64"),  # of block engines that this request took part in
    TensorField(name="steps", datatype="INT64"),  # that the sampler took
    TensorField(name="seconds", datatype="FP64"),  # from the first step to the last
    TensorField(name="queue_seconds", datatype="FP64"),  # before it
    TensorField(name="policy", datatype="STRING"),
)
EVENT: Final = TensorField(name="event", datatype="STRING")  # JSON: a command's answer, a stream's message
OUTPUTS: Final = (*IMAGES, *FACTS, EVENT)
IMAGE_NAMES: Final = tuple(field.name for field in IMAGES)

_INPUTS_BY_NAME: Final = {field.name: field for field in INPUTS}


def inputs_for(manifest: Manifest) -> tuple[TensorField, ...]:
    """Return the inputs that requests to a bundle's model may have: what it doesn't take is none."""
    model = manifest.model
    prompt, varying = model.conditions.prompt, model.latents.varying
    taken = {
        "class_labels": model.num_classes > 0,
        "prompts": manifest.text_encoder is not None,
        "negative_prompts": manifest.text_encoder is not None,
        "prompt_embeddings": prompt is not None,
        "prompt_mask": prompt is not None,
        "negative_embeddings": prompt is not None,
        "negative_mask": prompt is not None,
        "size": HEIGHT in varying or WIDTH in varying,
        "frames": FRAMES in varying,
        "frame_rate": model.conditions.frame_rate,
    }
    clips = FRAMES in model.latents.axes
    return tuple(_of_clips(field) if clips else field for field in INPUTS if taken.get(field.name, True))


def outputs_for(manifest: Manifest) -> tuple[TensorField, ...]:
    """Return the outputs of a bundle's model: those of clips have an axis of frames, after the batch's in what is seen.

    `png` is (B, F), `pixels` (B, F, H, W, C) and `latents` (B, C, F, H, W).
    """
    return tuple(_of_clips(field) for field in OUTPUTS) if FRAMES in manifest.model.latents.axes else OUTPUTS


def _of_clips(field: TensorField) -> TensorField:
    return replace(field, dims=(*field.dims, ANY)) if field.name in IMAGE_NAMES else field


def fields_from_tensors(tensors: Tensors) -> dict[str, Field]:
    """Return a request's values by name: single ones as Python's own, text decoded.

    Raises:
        RequestError: If a tensor is unknown, holds another number of values than its field, or text is not UTF-8.
    """
    return {name: _field(name, tensor) for name, tensor in tensors.items()}


def _field(name: str, tensor: Tensor) -> Field:
    field = _INPUTS_BY_NAME.get(name)
    if field is None:
        raise RequestError(f"{name} is no field of a request. Known: {', '.join(_INPUTS_BY_NAME)}.")
    if field.single and tensor.size != 1:
        raise RequestError(f"{name} holds {tensor.size} values, allowed is 1.")
    if field.datatype == "STRING":
        texts = [_text(name, value) for value in tensor.reshape(-1).tolist()]
        return texts[0] if field.single else texts
    if field.single:
        value: int | float = tensor.reshape(-1)[0].item()
        return value
    if len(field.dims) > 1:
        return (
            tensor.astype(np.float32, copy=False) if field.datatype == "FP32" else tensor.astype(np.int64, copy=False)
        )
    numbers: list[int] = tensor.reshape(-1).tolist()
    return numbers


def _text(name: str, value: bytes | str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def text_tensor(values: Iterable[str | bytes]) -> NDArray[np.object_]:
    """Return texts as Triton takes them: (N,) objects of bytes."""
    coded = [value.encode() if isinstance(value, str) else value for value in values]
    tensor: NDArray[np.object_] = np.empty(len(coded), dtype=np.object_)
    tensor[:] = coded
    return tensor
