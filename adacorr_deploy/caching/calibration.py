"""What calibration leaves for the policies, and the key that says for which runs it holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.core.errors import CalibrationError

CALIBRATION_SCHEMA_VERSION: Final = 1

NonNegative = Annotated[float, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class CalibrationKey(_Frozen):
    """Everything a calibration depends on; a run with another key is refused."""

    checkpoint_sha256: str
    sampler: str
    steps: Annotated[int, Field(ge=1)]
    guidance: Annotated[float, Field(ge=1)]
    latent_shape: tuple[int, int, int]

    def difference(self, other: CalibrationKey) -> str | None:
        """Return the first field in which the two differ, with both values, or None."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine}, the run's is {theirs}"
        return None


class Probe(_Frozen):
    """How the measured error of one block's prediction tells an easy request from a hard one.

    Attributes:
        block: The block part whose prediction is compared with its fresh output at every evaluation.
        expected: `expected[step][gap − 1][distance − 1]`: geometric mean over the calibration's images of that relative
            error, at an evaluation of `step`, `distance` after the last one, which lay `gap` after the one before.
        slope: Power of (measured ÷ expected) that the error of skipping was found to follow, both squared; in [0, 1].
    """

    block: Annotated[int, Field(ge=0)]
    expected: tuple[tuple[tuple[NonNegative, ...], ...], ...]
    slope: Annotated[float, Field(ge=0, le=1)]


class Calibration(_Frozen):
    """A calibration of one key and one predictor.

    Attributes:
        skip_costs: See `caching.schedule.SkipCosts`; geometric means over the images.
        probe: See `Probe`.
        offset_limits: `offset_limits[step][age − 1]`: the largest √Ŝ of the first block's input that calibration saw.
        paper_floors: Per block part: the upper quartile of the paper's score S at age 1, which `paper-lazy` subtracts.
    """

    schema_version: Literal[1] = CALIBRATION_SCHEMA_VERSION
    key: CalibrationKey
    predictor: Predictor
    images: Annotated[int, Field(ge=1)]
    skip_costs: tuple[tuple[tuple[NonNegative, ...], ...], ...]
    probe: Probe
    offset_limits: tuple[tuple[NonNegative, ...], ...]
    paper_floors: tuple[NonNegative, ...]

    @property
    def file_name(self) -> str:
        """The name under which a bundle keeps it: one for each key and predictor."""
        return f"{self.key.sampler}-{self.key.steps}-{self.key.guidance:g}-{self.predictor.label}.json"

    @model_validator(mode="after")
    def _shapes_agree(self) -> Calibration:
        steps = self.key.steps
        for name, table in (
            ("skip_costs", self.skip_costs),
            ("probe.expected", self.probe.expected),
            ("offset_limits", self.offset_limits),
        ):
            if len(table) != steps:
                raise ValueError(f"{name} has {len(table)} steps, the key says {steps}")
        for name, cube in (("skip_costs", self.skip_costs), ("probe.expected", self.probe.expected)):
            if len({(len(rows), len(row)) for rows in cube for row in rows}) != 1:
                raise ValueError(f"{name} is ragged")
        if self.probe.block >= len(self.paper_floors):
            raise ValueError(f"probe.block is {self.probe.block}, there are {len(self.paper_floors)} block parts")
        return self


def calibration_from_json(text: str | bytes, *, where: str) -> Calibration:
    """Parse and validate a calibration file.

    Raises:
        CalibrationError: If it is not one of this schema.
    """
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"])
        raise CalibrationError(
            f"{where}: {field or 'file'}: {first['msg']}. Make it again with adacorr-calibrate."
        ) from error


def calibration_for_run(
    calibrations: Iterable[Calibration], key: CalibrationKey, predictor: Predictor | None, *, policy: str
) -> Calibration:
    """Return the calibration that holds for `key` and, where given, was made for `predictor`.

    Raises:
        CalibrationError: If none does; the message says how the nearest differs and how to make one.
    """
    found = list(calibrations)
    matching = [calibration for calibration in found if calibration.key == key]
    for calibration in matching:
        if predictor is None or calibration.predictor == predictor:
            return calibration
    if matching and predictor is not None:
        made = ", ".join(sorted({calibration.predictor.label for calibration in matching}))
        reason = f"the bundle's are for predictor {made}, not {predictor.label}"
    elif found:
        reason = f"the bundle's is for another run ({found[0].key.difference(key)})"
    else:
        reason = "the bundle holds none"
    wanted = f" --predictor {predictor.kind.value} --order {predictor.order}" if predictor else ""
    raise CalibrationError(
        f"policy {policy} needs a calibration; {reason}. Make one with: "
        f"adacorr-calibrate BUNDLE --sampler {key.sampler} --steps {key.steps} --guidance {key.guidance:g}{wanted}, "
        "or choose --policy fora or none."
    )
