"""What a repository's model is served with: written by adacorr-serve, read and checked when the server loads it."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.manifest import PlainText, PresetName
from adacorr_deploy.core.samplers import MAX_GUIDANCE, Sampler
from adacorr_deploy.core.untrusted import bounded_file, first_fault
from adacorr_deploy.runtime.batching import DEFAULT_BUCKETS, MAX_LANES

SETTINGS_NAME: Final = "serving.json"
BUNDLE_NAME: Final = "model.bundle"
POLICIES_DIR: Final = "policies"
CPU_BACKEND: Final = "onnxruntime"  # opens any bundle's ONNX files

_MAX_BYTES: Final = 1 << 20
_MAX_ROWS: Final = 4096


class Quality(str, Enum):
    """What a client may ask for without knowing policies."""

    EXACT = "exact"  # every block of every step
    BALANCED = "balanced"
    FAST = "fast"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunDefaults(_Frozen):
    """What a request that doesn't say takes: a run that the bundle is calibrated for, if there is one."""

    steps: Annotated[int, Field(ge=1)] = 50
    guidance: Annotated[float, Field(ge=1, le=MAX_GUIDANCE)] = 4.0
    sampler: Sampler = Sampler.DDIM


class Limits(_Frozen):
    """What bounds the server's memory and a client's patience."""

    max_images: Annotated[int, Field(ge=1, le=_MAX_ROWS)] = 16  # of one request
    max_queue: Annotated[int, Field(ge=1, le=100_000)] = 64  # requests that wait; one more is refused
    batch_rows: Annotated[tuple[Annotated[int, Field(ge=1, le=_MAX_ROWS)], ...], Field(min_length=1)] = DEFAULT_BUCKETS
    lanes: Annotated[int, Field(ge=1, le=MAX_LANES)] | None = None  # see `lanes_on`

    def lanes_on(self, backend: str | None) -> int:
        """Return how many requests are served side by side with a backend.

        On a CPU one for each core, each with a core of its own, unless `lanes` says otherwise: cores that share every
        launch of small models wait for one another (`tools/benchmarks/batching.py`). On a GPU one.
        """
        if backend != CPU_BACKEND:
            return 1
        return self.lanes or len(os.sched_getaffinity(0))


class ServingSettings(_Frozen):
    """All of it.

    Attributes:
        model: The served model's name.
        defaults: Of requests.
        limits: Of requests and of the queue.
        quality: The policy of each tier.
        policies: Names of policy files that stand in the repository, for requests to name.
    """

    schema_version: Literal[1] = 1
    model: PlainText
    defaults: RunDefaults = RunDefaults()
    limits: Limits = Limits()
    quality: dict[Quality, PresetName]
    policies: dict[PlainText, Annotated[str, Field(pattern=r"^[\w.-]+\.(json|toml)$")]] = {}  # name → file


def settings_from_file(path: Path) -> ServingSettings:
    """Read a repository's settings.

    Raises:
        BundleError: If they can't be read, or a field is not valid.
    """
    try:
        return ServingSettings.model_validate_json(bounded_file(path, limit_bytes=_MAX_BYTES))
    except ValidationError as error:
        fault = first_fault(error)
    except (OSError, ValueError) as error:
        fault = f"can't be read ({error})"
    raise BundleError(f"{path}: {fault}. Write the repository anew with adacorr-serve.")
