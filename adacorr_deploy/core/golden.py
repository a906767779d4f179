"""The golden sample: a small request and what the original model makes of it, to test engines where they run.

The file is untrusted: `GoldenSample` lets through only finite numbers in bounds; whoever uses them compares their sizes
with the bundle's model.
"""

from __future__ import annotations

import base64
import math
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from adacorr_deploy.core.engine_build import Size
from adacorr_deploy.core.samplers import MAX_GUIDANCE, Sampler
from adacorr_deploy.core.specs import ModelSpec

GOLDEN_DIR: Final = "golden"
GOLDEN_FILE: Final = f"{GOLDEN_DIR}/sample.json"
_STORED: Final = np.dtype("<f4")
_NUMBER_BYTES: Final = 6  # of a float32 in base64, at most
_REST_BYTES: Final = 4096  # of everything that is no latents
_MOST_BYTES: Final = 1 << 30  # whatever shape a manifest claims


def _latents_from_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    latents = np.frombuffer(base64.b64decode(value, validate=True), _STORED).astype(np.float32)
    if not np.isfinite(latents).all():
        raise ValueError("it holds NaN or infinite values")
    return latents


def _text_from_latents(latents: NDArray[np.float32]) -> str:
    return base64.b64encode(latents.astype(_STORED).tobytes()).decode("ascii")


# One image, (C, H, W). In a file: float32, little-endian, row by row, in base64; read from there, it has no shape yet.
Latents = Annotated[NDArray[np.float32], BeforeValidator(_latents_from_text), PlainSerializer(_text_from_latents)]


class GoldenSample(BaseModel):
    """One image, sampled without noise by the original PyTorch modules in float32.

    Attributes:
        label: Of models that take none, None; their prompt is the first of `runtime.example_requests`.
        sampler: One whose steps add no noise.
        initial: Where it starts.
        final: Where it ends.
        tolerance: By how much engines of the bundle's precision may miss `final`, as a relative L2 error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    schema_version: Literal[1] = 1
    label: Annotated[int, Field(ge=0)] | None = None
    sampler: Sampler = Sampler.DDIM
    steps: Size
    guidance: Annotated[float, Field(ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)]
    tolerance: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    initial: Latents
    final: Latents


def largest_golden_bytes(model: ModelSpec) -> int:
    """Return how much the file of a model's golden sample may hold."""
    return min(_MOST_BYTES, _REST_BYTES + 2 * _NUMBER_BYTES * math.prod(model.latent_shape))
