"""What published policies look up: fits and tables of one model's uncached runs, and the key that says for which.

A profile is as untrusted as a calibration, and is read with the same care: `profile_from_json` lets through only what
policies can reckon with, and `check_profile` compares it with the bundle's model. Each quantity may be missing; a
policy that needs one is refused with the command that measures it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from adacorr_deploy.caching.calibration import MAX_MEASURE, CalibrationKey, Measure
from adacorr_deploy.caching.policy import word_for_commands
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import ModelSpec
from adacorr_deploy.core.untrusted import first_fault

PROFILE_SCHEMA_VERSION: Final = 1
POLYNOMIAL_DEGREE: Final = 4
_MAX_AGE: Final = 64


class Quantity(str, Enum):
    """What a profile may hold; the value is its field's name."""

    OUTPUT_CHANGE = "output_change"  # TeaCache
    MAGNITUDE_RATIOS = "magnitude_ratios"  # MagCache
    UNIT_ERRORS = "unit_errors"  # SmoothCache
    PART_ERRORS = "part_errors"  # Block Caching
    AFFINE = "affine"  # Block Caching's scale and shift, FastCache
    GATES = "gates"  # LazyDiT


def _age_error(value: float) -> float:
    if not (0 <= value <= MAX_MEASURE or value == math.inf):
        raise ValueError(f"allowed are 0 … {MAX_MEASURE:g}, and Infinity before the run's first step")
    return value


Weight = Annotated[float, Field(ge=-MAX_MEASURE, le=MAX_MEASURE, allow_inf_nan=False)]
Weights = Annotated[tuple[Weight, ...], Field(min_length=1)]
AgeError = Annotated[float, AfterValidator(_age_error)]
UnitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
ErrorTable = Annotated[  # [step][age − 1]
    tuple[Annotated[tuple[AgeError, ...], Field(min_length=1, max_length=_MAX_AGE)], ...], Field(min_length=1)
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ChangePolynomial(_Frozen):
    """How much the model's output changes when the first block's modulated input does (TeaCache, arXiv 2411.19108).

    Attributes:
        coefficients: Of the polynomial of degree 4, the highest power first.
        low: The least relative L1 change of the input that was fitted; below it the polynomial says nothing.
        high: The largest.
    """

    coefficients: Annotated[tuple[Weight, ...], Field(min_length=POLYNOMIAL_DEGREE + 1, max_length=5)]
    low: Measure
    high: Measure

    @model_validator(mode="after")
    def _range_rises(self) -> ChangePolynomial:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, allowed is at most high, {self.high:g}")
        return self

    def at(self, input_change: float) -> float:
        """Return the relative L1 change of the output, at least 0.

        Args:
            input_change: Relative L1 change of the modulated input since the last step. Outside the fitted range the
                nearest end counts: a polynomial of degree 4 runs away there.
        """
        x = min(max(input_change, self.low), self.high)
        value = 0.0
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return max(value, 0.0)


class AffineMap(_Frozen):
    """Least squares of what a span adds now on what it added some steps ago: r ≈ scale ⊙ r̄ + shift, per channel.

    It covers the block parts first … stop − 1 (the scale-shift of Block Caching, arXiv 2312.03209, in closed form, and
    the learnable approximation of FastCache, arXiv 2505.20353).
    """

    first: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]
    scale: Weights
    shift: Weights

    @model_validator(mode="after")
    def _fits(self) -> AffineMap:
        if self.stop <= self.first:
            raise ValueError(f"stop is {self.stop}, allowed is more than first, {self.first}")
        if len(self.shift) != len(self.scale):
            raise ValueError(f"shift holds {len(self.shift)} numbers, allowed are scale's {len(self.scale)}")
        return self


class LinearGate(_Frozen):
    """A block part's gate: the logit of "reusing is safe" from its first modulated input's mean over tokens.

    logit = weights · mean + bias; at 0 either is as likely (LazyDiT, arXiv 2412.12444).
    """

    weights: Weights
    bias: Weight


class Profile(_Frozen):
    """The profile of one key.

    Attributes:
        images: Images that it was measured on; values are means over them and over the guidance branches.
        output_change: See `ChangePolynomial`.
        magnitude_ratios: Per step, the mean over tokens of ‖r(s)‖ / ‖r(s − 1)‖ for the residual r of all blocks;
            1 at the first (MagCache, arXiv 2506.09045).
        unit_errors: By kind of unit, `attention`, `mlp`, …: relative L1 errors of reusing its result of so many steps
            before, [step][age − 1], ‖u(s) − u(s − age)‖₁ / ‖u(s)‖₁ before gates, means over the depth (SmoothCache,
            arXiv 2411.10510).
        part_errors: `part_errors[part][step][age − 1]`: ‖r(s) − r(s − age)‖₁ / ‖r(s)‖₁ of what the part adds to its
            input; at age 1 Block Caching's change per block and step.
        affine: Maps of every part and of the spans that were asked for.
        gates: Per block part.
    """

    schema_version: Literal[1] = PROFILE_SCHEMA_VERSION
    key: CalibrationKey
    images: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    output_change: ChangePolynomial | None = None
    magnitude_ratios: tuple[Measure, ...] | None = None
    unit_errors: Annotated[dict[UnitName, ErrorTable], Field(min_length=1, max_length=64)] | None = None
    part_errors: Annotated[tuple[ErrorTable, ...], Field(min_length=1)] | None = None
    affine: Annotated[tuple[AffineMap, ...], Field(min_length=1)] | None = None
    gates: Annotated[tuple[LinearGate, ...], Field(min_length=1)] | None = None

    @property
    def file_name(self) -> str:
        """What it is stored as in a bundle: one name for each key."""
        return f"{profile_name(self.key)}.json"

    @property
    def quantities(self) -> frozenset[Quantity]:
        return frozenset(quantity for quantity in Quantity if getattr(self, quantity.value) is not None)

    def affine_map(self, first: int, stop: int) -> AffineMap | None:
        """Return the map of a span of block parts, or None if it was not measured."""
        return next((each for each in self.affine or () if (each.first, each.stop) == (first, stop)), None)

    @model_validator(mode="after")
    def _tables_fit(self) -> Profile:
        if self.magnitude_ratios is not None and len(self.magnitude_ratios) != self.key.steps:
            raise ValueError(
                f"magnitude_ratios holds {len(self.magnitude_ratios)} numbers, allowed are the key's {self.key.steps}"
            )
        for kind, table in (self.unit_errors or {}).items():
            self._check_table(f"unit_errors.{kind}", table)
        for part, table in enumerate(self.part_errors or ()):
            self._check_table(f"part_errors.{part}", table)
        return self

    def _check_table(self, name: str, table: Sequence[Sequence[float]]) -> None:
        if len(table) != self.key.steps:
            raise ValueError(f"{name} has {len(table)} steps, allowed are the key's {self.key.steps}")
        if lengths := {len(row) for row in table} - {len(table[0])}:
            raise ValueError(f"{name} has rows of {lengths.pop()} and of {len(table[0])} ages, allowed is one length")


def profile_name(key: CalibrationKey) -> str:
    """Return what tells a profile apart from a bundle's others, as the stem of a file's name."""
    return f"{key.sampler}-{key.steps}-{key.guidance!r}"


def profile_from_json(text: str | bytes, *, where: str, bundle: str = "BUNDLE") -> Profile:
    """Parse and validate a profile file.

    Args:
        text: Its content.
        where: Its path, for the message.
        bundle: The bundle's, for the command that makes it again.

    Raises:
        CalibrationError: If it is not one of this schema, or holds what no profile can.
    """
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        command = f"adacorr-calibrate {bundle} --policies NAMES"
        with suppress(ValidationError):
            command = profile_command(bundle, _MadeFor.model_validate_json(text).key)
        raise CalibrationError(f"{where}: {first_fault(error)}. Make it again with: {command}") from error


class _MadeFor(BaseModel):
    """What a profile is for, read also from a file that is not one otherwise."""

    key: CalibrationKey


def check_profile(profile: Profile, model: ModelSpec, *, where: str, bundle: str = "BUNDLE") -> None:
    """Refuse a profile of another number of block parts, or of another width, than the bundle's model has.

    Raises:
        CalibrationError: If so.
    """
    parts, width = len(model.units), model.width
    for name, found, allowed in (
        ("part_errors", len(profile.part_errors or range(parts)), parts),
        ("gates", len(profile.gates or range(parts)), parts),
        *((f"gates.{part}.weights", len(gate.weights), width) for part, gate in enumerate(profile.gates or ())),
        *((f"affine.{index}.scale", len(each.scale), width) for index, each in enumerate(profile.affine or ())),
    ):
        if found != allowed:
            fault = f"{name} holds {found} entries, allowed are the model's {allowed}"
            raise CalibrationError(f"{where}: {fault}. Make it again with: {profile_command(bundle, profile.key)}")
    for index, each in enumerate(profile.affine or ()):
        if each.stop > parts:
            fault = f"affine.{index}.stop is {each.stop}, allowed are 1 … {parts}: the bundle's block parts"
            raise CalibrationError(f"{where}: {fault}. Make it again with: {profile_command(bundle, profile.key)}")


def profile_command(bundle: str, key: CalibrationKey, policies: str = "NAMES") -> str:
    """Return the command that measures what policies need for a key."""
    guidance = repr(key.guidance).removesuffix(".0")
    run = f"--sampler {key.sampler} --steps {key.steps} --guidance {guidance}"
    return f"adacorr-calibrate {bundle} {run} --policies {policies}"


def profile_for_run(
    profiles: Iterable[Profile],
    key: CalibrationKey,
    needed: Collection[Quantity],
    *,
    policy: str,
    bundle: str = "BUNDLE",
) -> Profile:
    """Return the profile that holds for `key` and has what a policy needs.

    Raises:
        CalibrationError: If none does; the message says what is missing and how to measure it.
    """
    found = list(profiles)
    matching = next((profile for profile in found if profile.key == key), None)
    missing = sorted(quantity.value for quantity in needed if matching and quantity not in matching.quantities)
    if matching is not None and not missing:
        return matching
    if matching is not None:
        reason = f"the bundle's has no {', '.join(missing)}"
    elif found:
        reason = f"the bundle's is for another run ({found[0].key.difference(key)})"
    else:
        reason = "the bundle holds none"
    raise CalibrationError(
        f"policy {policy} needs a profile of the model; {reason}. "
        f"Measure it with: {profile_command(bundle, key, word_for_commands(policy))}"
    )
