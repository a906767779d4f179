"""For what a bundle's engines were compiled: the backend's version, GPUs, sizes, and where the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS

MAX_SIZE: Final = 4096
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Range = tuple[Size, Size, Size]  # smallest, tuned for, largest
_BRANCHES: Range = (1, 2, 2)  # without and with classifier-free guidance


class WeightLayout(str, Enum):
    """Where the weights of compiled engines are."""

    BAKED = "baked"  # in the engines: one engine per part
    INPUTS = "inputs"  # inputs of the engines, read from the parts' weight files: one engine per structure of a part


class Profile(BaseModel):
    """Sizes that compiled engines take: smallest, tuned for, largest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Range = (1, 8, 16)
    steps: Range = (1, 50, 100)

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        for name, (smallest, tuned, largest) in (("batch", self.batch), ("steps", self.steps)):
            if not smallest <= tuned <= largest:
                raise ValueError(
                    f"{name} {smallest},{tuned},{largest} is not in the order smallest, tuned for, largest"
                )
        return self

    def axes(self) -> Mapping[str, Range]:
        """Return the range of every named axis of a part."""
        low, tuned, high = (batch * branches for batch, branches in zip(self.batch, _BRANCHES, strict=True))
        return {BATCH: self.batch, BRANCHES: _BRANCHES, ROWS: (low, tuned, high), STEPS: self.steps}

    def check(self, *, batch: int, steps: int) -> None:
        """Refuse a request that the engines were not compiled for.

        Raises:
            RequestError: If the batch or the steps are outside the profile.
        """
        for name, value, (smallest, _, largest) in (("batch", batch, self.batch), ("steps", steps, self.steps)):
            if not smallest <= value <= largest:
                option = "--batch" if name == "batch" else "--max-steps"
                raise RequestError(
                    f"{name} {value} is outside what the bundle's engines were compiled for, {smallest} … {largest}. "
                    f"Change the request, or rebuild the bundle with adacorr-build {option}."
                )


class EngineBuild(BaseModel):
    """How the engines of a bundle were compiled; what opens them compares it with the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+){1,4}$")]  # of the compiler's Python module
    targets: tuple[Annotated[str, Field(pattern=r"^sm_[0-9]{2,3}$")], ...]  # none: the compiler's portable default
    weights: WeightLayout
    profile: Profile
    version_compatible: bool = False

    def for_gpu(self, target: str) -> EngineBuild:
        """Return the same with one target: the GPU that the compiler tuned for."""
        return self.model_copy(update={"targets": (target,)})


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerOptions:
    """What a build asks of the compiler.

    Attributes:
        profile: Sizes that the engines take.
        targets: GPUs, as `sm_86`; none means the compiler's portable default, or the GPU in the machine.
        weights: See `WeightLayout`.
        version_compatible: Let later releases of TensorRT open the plans.
        timing_cache: File that keeps TensorRT's tunings from one build to the next; it is made if it is not there.
    """

    profile: Profile = field(default_factory=Profile)
    targets: tuple[str, ...] = ()
    weights: WeightLayout = WeightLayout.BAKED
    version_compatible: bool = False
    timing_cache: Path | None = None
