"""What a caller asks for, checked before anything is allocated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.core.samplers import MAX_GUIDANCE, Sampler, SamplerTable, check_sampler, sampler_table
from adacorr_deploy.core.schedules import Schedule
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import ModelSpec
from adacorr_deploy.core.untrusted import clipped
from adacorr_deploy.plugins.oracle import philox_normals
from adacorr_deploy.runtime.conditions import Prompts, check_conditions

MAX_SEED: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One batch of images, or clips: B is the number of labels, or of prompts, whichever the model takes.

    More fields than elsewhere here: it is what people write, and a flat list of names is read the easiest.
    """

    labels: tuple[int, ...] = ()  # one class per image
    steps: int = 50
    guidance: float = 4.0  # weight of the conditional branch; 1 means no guidance and half the work
    seed: int = 0  # image b draws from Philox(seed, b): it does not depend on its neighbours
    sampler: Sampler = Sampler.DDIM
    latents: NDArray[np.float32] | None = field(default=None, compare=False)  # (B, C, H, W), instead of drawn ones
    eta: float = 0.0  # noise of DDIM's steps, 0 … 1; no other sampler takes it
    prompts: Prompts | None = field(default=None, compare=False)  # one per image
    size: LatentSize | None = None  # latent pixels, (H, W) or (F, H, W); None: the model's default
    frame_rate: float | None = None  # frames per second, of models that take it

    @property
    def batch(self) -> int:
        return len(self.labels) if self.prompts is None else len(self.prompts)

    def latent_shape(self, model: ModelSpec) -> tuple[int, ...]:
        """Return the shape of an image's latents, (C, H, W) or (C, F, H, W)."""
        return model.latents.shape_at(self.size)

    @property
    def sampler_label(self) -> str:
        """`ddpm`, `ddim with eta 0.5`: the sampler as messages name it."""
        return f"{self.sampler.value} with eta {self.eta:g}" if self.eta else self.sampler.value

    @property
    def branches(self) -> int:
        return 1 if self.guidance == 1.0 else 2

    def branch_weights(self) -> NDArray[np.float32]:
        """Return what each branch's output is multiplied with before they are added, (K, B)."""
        weights = [self.guidance, 1.0 - self.guidance][: self.branches]
        return np.repeat(np.asarray(weights, dtype=np.float32)[:, None], self.batch, axis=1)

    def rows(self, num_classes: int) -> NDArray[np.int64]:
        """Return the label of each row, (R,): the conditional rows, then the null label's."""
        null = [num_classes] * (self.batch * (self.branches - 1))
        return np.asarray([*self.labels, *null], dtype=np.int64)


def check_request(request: SampleRequest, model: ModelSpec, schedule: Schedule) -> None:
    """Refuse a request that the model can't serve.

    Raises:
        RequestError: If the labels, prompts, size, frame rate, steps, guidance, seed, sampler, eta or latents are
            out of range.
    """
    if model.num_classes or request.labels:
        _check_labels(request.labels, model.num_classes)
    check_conditions(request, model)
    check_integer("the number of images", request.batch, 1, MAX_BATCH)
    check_sampler(schedule, request.sampler, steps=request.steps, eta=request.eta)
    check_integer("seed", request.seed, 0, MAX_SEED)
    if (
        request.sampler is Sampler.DDPM
        and not model.learned_variance
        and table_from_request(request, model, schedule).needs_variance
    ):
        raise RequestError("sampler is ddpm with a learned variance, which this model does not predict. Use ddim.")
    guidance: object = request.guidance  # an untyped caller may pass anything
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 1 <= guidance <= MAX_GUIDANCE:
        raise RequestError(
            f"guidance is {clipped(guidance)}, allowed is at least 1, which turns it off, and at most {MAX_GUIDANCE:g}."
        )
    if request.latents is not None:
        check_latents(request.latents, (request.batch, *request.latent_shape(model)))


def table_from_request(request: SampleRequest, model: ModelSpec, schedule: Schedule) -> SamplerTable:
    """Return the sampler's table of a request.

    Raises:
        RequestError: If the sampler, steps or eta are out of range.
    """
    return sampler_table(
        schedule, request.sampler, request.steps, eta=request.eta, tokens=model.latents.tokens_at(request.size)
    )


def _check_labels(labels: object, num_classes: int) -> None:
    if not num_classes:
        raise RequestError("labels are given, and this model takes none. Leave them out.")
    if not isinstance(labels, (tuple, list)):  # an untyped caller may pass anything
        allowed = f"a tuple of whole numbers from 0 to {num_classes - 1}, one per image"
        raise RequestError(f"labels is {clipped(labels)}, allowed is {allowed}.")
    if not labels:
        raise RequestError("labels is empty. Give one class label per image.")
    check_integer("the number of labels", len(labels), 1, MAX_BATCH)
    for label in labels:
        check_integer("label", label, 0, num_classes - 1)


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is not a whole number from `low` to `high`.

    Raises:
        RequestError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise RequestError(f"{name} is {clipped(value)}, allowed are whole numbers from {low} to {high}.")


def check_latents(latents: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    """Refuse what is no finite float32 array of `shape`.

    Raises:
        RequestError: If it is not.
    """
    if not isinstance(latents, np.ndarray):
        raise RequestError(f"latents is a {type(latents).__name__}, allowed is a float32 NumPy array of shape {shape}.")
    if latents.shape != shape:
        raise RequestError(f"latents has shape {latents.shape}, this model and {shape[0]} images need {shape}.")
    if latents.dtype != np.float32:
        raise RequestError(f"latents is {latents.dtype}, allowed is float32. Convert with: latents.astype('float32')")
    if bad := int(np.size(latents) - np.isfinite(latents).sum()):
        raise RequestError(f"latents holds {bad} values that are NaN or infinite. Give finite numbers only.")


class NoiseStream:
    """The random numbers of a request: image b's depend on the seed and b alone, whatever the batch around it.

    Draw 0 is the initial latents; each step that adds noise takes the next. A GPU makes the same ones by itself.
    """

    def __init__(self, request: SampleRequest, latent_shape: tuple[int, ...]) -> None:
        self._seed = request.seed
        self._shape = (request.batch, *latent_shape)

    def at(self, draw: int) -> NDArray[np.float32]:
        """Return the standard normals of a draw, (B, C, H, W), or with frames."""
        count = math.prod(self._shape[1:])
        images = [philox_normals(self._seed, image, draw, count) for image in range(self._shape[0])]
        return np.stack(images).reshape(self._shape)

    @property
    def keys(self) -> NDArray[np.int64]:
        """The generators' keys, (B, 2): seed and image, as the bits of unsigned integers."""
        keys = [(self._seed, image) for image in range(self._shape[0])]
        return np.array(keys, dtype=np.uint64).view(np.int64)


def draws_of_steps(table: SamplerTable) -> Iterator[int | None]:
    """Yield which draw each step of a run adds, None where it adds nothing."""
    draws = itertools.count(1)
    return (next(draws) if noisy else None for noisy in table.noisy_steps)
