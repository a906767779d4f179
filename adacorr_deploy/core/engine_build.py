"""For what a bundle's engines were compiled: the backend's version, GPUs, sizes, and where the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS, TOKENS

MAX_SIZE: Final = 4096
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Range = tuple[Size, Size, Size]  # smallest, tuned for, largest
_Length = Annotated[int, Field(ge=1, le=MAX_SIZE**2)]  # along an axis of latents, or of all their tokens
_LengthRange = tuple[_Length, _Length, _Length]
_BRANCHES: Range = (1, 2, 2)  # without and with classifier-free guidance
_OPTIONS: Final[Mapping[str, str]] = {
    "batch": "--batch",
    "steps": "--max-steps",
    "frames": "--frames",
    "height": "--height",
    "width": "--width",
}


class WeightLayout(str, Enum):
    """Where the weights of compiled engines are."""

    BAKED = "baked"  # in the engines: one engine per part
    INPUTS = "inputs"  # inputs of the engines, read from the parts' weight files: one engine per structure of a part


class Profile(BaseModel):
    """Sizes that compiled engines take: smallest, tuned for, largest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch: Range = (1, 8, 16)
    steps: Range = (1, 50, 100)
    sizes: dict[str, _LengthRange] = Field(default_factory=dict)  # of latents, by axis, and of tokens; where they vary

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        for name, (smallest, tuned, largest) in (("batch", self.batch), ("steps", self.steps), *self.sizes.items()):
            if not smallest <= tuned <= largest:
                raise ValueError(
                    f"{name} {smallest},{tuned},{largest} is not in the order smallest, tuned for, largest"
                )
        return self

    def axes(self) -> Mapping[str, Range]:
        """Return the range of every named axis of a part."""
        low, tuned, high = (batch * branches for batch, branches in zip(self.batch, _BRANCHES, strict=True))
        return {BATCH: self.batch, BRANCHES: _BRANCHES, ROWS: (low, tuned, high), STEPS: self.steps, **self.sizes}

    def for_latents(self, latents: LatentSpec) -> Profile:
        """Return the profile of a model's parts: what is left open is fixed at the size that its requests have.

        Raises:
            RequestError: If a size was asked for that the model's latents can't have.
        """
        chosen = {}
        for (name, low, high), patch, size in zip(latents.ranges, latents.patch, latents.shape[1:], strict=True):
            chosen[name] = self.sizes.get(name, (size, size, size))
            outside = not low <= min(chosen[name]) <= max(chosen[name]) <= high
            if outside or any(length % patch for length in chosen[name]):
                allowed = f"{low} … {high} in multiples of {patch}" if low < high else f"{low} alone"
                raise RequestError(
                    f"{_OPTIONS[name]} is {','.join(map(str, chosen[name]))}, this model's latents take {allowed}."
                )
        if unknown := [name for name in self.sizes if name not in chosen]:
            raise RequestError(f"{_OPTIONS.get(unknown[0], unknown[0])} is given, and this model's latents have none.")
        if not latents.varying:
            return self.model_copy(update={"sizes": {}})
        low, tuned, high = (latents.tokens_at(size) for size in zip(*chosen.values(), strict=True))
        sizes = {name: chosen[name] for name in latents.varying}
        return self.model_copy(update={"sizes": {**sizes, TOKENS: (low, tuned, high)}})

    def check(self, *, batch: int, steps: int, sizes: Mapping[str, int] = MappingProxyType({})) -> None:
        """Refuse a request that the engines were not compiled for.

        Raises:
            RequestError: If the batch, the steps or one of the sizes, by axis, are outside the profile.
        """
        compiled = {"batch": self.batch, "steps": self.steps, **self.sizes}
        asked = {"batch": batch, "steps": steps, **{name: sizes[name] for name in self.sizes.keys() & sizes.keys()}}
        for name, value in asked.items():
            smallest, _, largest = compiled[name]
            if not smallest <= value <= largest:
                option = _OPTIONS.get(name, "--height and --width")
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
