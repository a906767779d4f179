"""What calibration leaves for the policies, and the key that says for which runs it holds.

A calibration file is untrusted: whatever it holds, the models here let through only what the planner and the
controllers can reckon with, and `check_blocks` compares it with the bundle's model.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from adacorr_deploy.caching.decisions import Span, SpanCache
from adacorr_deploy.caching.policy import UNCALIBRATED, word_for_commands
from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import CalibrationError
from adacorr_deploy.core.manifest import Sha256
from adacorr_deploy.core.samplers import MAX_GUIDANCE
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import ModelSpec
from adacorr_deploy.core.untrusted import clipped, first_fault

CALIBRATION_SCHEMA_VERSION: Final = 1

# Far beyond what any model was measured at, and far from where sums, ratios and exponentials of them overflow.
MAX_MEASURE: Final = 1e12
MIN_COST: Final = 1e-30
MIN_PROBE_ERROR: Final = 1e-9
_MAX_REACH: Final = 64  # steps of a gap or of a skip


def _cost(value: float) -> float:
    if not (MIN_COST <= value <= MAX_MEASURE or value == math.inf):
        raise ValueError(f"allowed are {MIN_COST:g} … {MAX_MEASURE:g}, and Infinity where it can't be skipped")
    return value


def _probe_error(value: float) -> float:
    if not (MIN_PROBE_ERROR <= value <= MAX_MEASURE or value == 0.0):
        raise ValueError(f"allowed are {MIN_PROBE_ERROR:g} … {MAX_MEASURE:g}, and 0 where it was not measured")
    return value


Measure = Annotated[float, Field(ge=0, le=MAX_MEASURE, allow_inf_nan=False)]
Cost = Annotated[float, AfterValidator(_cost)]
ProbeError = Annotated[float, AfterValidator(_probe_error)]
_REACH = Field(min_length=1, max_length=_MAX_REACH)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class CalibrationKey(_Frozen):
    """Everything a calibration depends on; a run with another key is refused."""

    checkpoint_sha256: Sha256
    sampler: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    steps: Annotated[int, Field(ge=1, le=100_000)]
    guidance: Annotated[float, Field(ge=1, le=MAX_GUIDANCE, allow_inf_nan=False)]
    latent_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4)]  # (C, H, W) or (C, F, H, W)

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
    expected: tuple[Annotated[tuple[Annotated[tuple[ProbeError, ...], _REACH], ...], _REACH], ...]
    slope: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class CachingSpan(_Frozen):
    """Block parts first … stop − 1, which keep together what they add to their input."""

    first: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]


def caching_spans(spans: Sequence[Span]) -> tuple[CachingSpan, ...]:
    """Return those that keep residuals: what a calibration depends on beside its key and predictor.

    Of a predictor that keeps units or the output there are none: its calibration is for every part, or the whole step.
    """
    return tuple(CachingSpan(first=span.first, stop=span.stop) for span in spans if span.cache is SpanCache.RESIDUAL)


class Calibration(_Frozen):
    """A calibration of one key, one predictor and, of residuals, certain spans.

    Attributes:
        spans: See `caching_spans`.
        skip_costs: See `caching.schedule.SkipCosts`; geometric means over the images. A row never falls.
        probe: See `Probe`.
        offset_limits: `offset_limits[step][age − 1]`: the largest √Ŝ of the first block's input that calibration saw.
        paper_floors: Per block part, the upper quartile of the paper's score S at age 1, which `paper-lazy` subtracts.
    """

    schema_version: Literal[1] = CALIBRATION_SCHEMA_VERSION
    key: CalibrationKey
    predictor: Predictor
    spans: tuple[CachingSpan, ...] = ()
    images: Annotated[int, Field(ge=1, le=MAX_BATCH)]
    skip_costs: tuple[Annotated[tuple[Annotated[tuple[Cost, ...], _REACH], ...], _REACH], ...]
    probe: Probe
    offset_limits: tuple[Annotated[tuple[Measure, ...], _REACH], ...]
    paper_floors: Annotated[tuple[Measure, ...], Field(min_length=1)]

    @property
    def file_name(self) -> str:
        """What it is stored as in a bundle: one name for each key, predictor and spans."""
        return f"{calibration_name(self.key, self.predictor, self.spans)}.json"

    @model_validator(mode="after")
    def _spans_fit(self) -> Calibration:
        keeps_residuals = self.predictor.kind.cache is SpanCache.RESIDUAL
        if keeps_residuals != bool(self.spans):
            allowed = "at least one" if keeps_residuals else "none"
            raise ValueError(
                f"spans holds {len(self.spans)}, allowed is {allowed} for predictor {self.predictor.label}"
            )
        edges = [0, *(edge for span in self.spans for edge in (span.first, span.stop)), len(self.paper_floors)]
        if edges != sorted(edges) or any(span.first == span.stop for span in self.spans):
            ranges = clipped([(span.first, span.stop) for span in self.spans])
            raise ValueError(f"spans are {ranges}, allowed are ranges in order of 0 … {len(self.paper_floors)}")
        return self

    @model_validator(mode="after")
    def _tables_fit(self) -> Calibration:
        self._check_table("skip_costs", self.skip_costs)
        for step, gap in itertools.product(range(self.key.steps), range(len(self.skip_costs[0]))):
            self._check_rises(self.skip_costs[step][gap], f"skip_costs.{step}.{gap}")
        self._check_table("probe.expected", self.probe.expected)
        self._check_table("offset_limits", [(row,) * len(self.skip_costs[0]) for row in self.offset_limits])
        blocks = 1 if self.predictor.whole_step else len(self.paper_floors)  # whole steps have no blocks
        if self.probe.block >= blocks:
            raise ValueError(f"probe.block is {self.probe.block}, allowed are 0 … {blocks - 1}")
        return self

    def _check_table(self, name: str, table: Sequence[Sequence[Sequence[float]]]) -> None:
        """Refuse a table that has not one entry per step, or not as many gaps and skipped steps as `skip_costs`."""
        if len(table) != self.key.steps:
            raise ValueError(f"{name} has {len(table)} steps, allowed are the key's {self.key.steps}")
        gaps, skipped = len(self.skip_costs[0]), len(self.skip_costs[0][0])
        for step, rows in enumerate(table):
            if [len(row) for row in rows] != [skipped] * gaps:
                lengths = clipped([len(row) for row in rows])
                raise ValueError(f"{name}.{step} has rows of {lengths} numbers, allowed are {gaps} of {skipped}")

    @staticmethod
    def _check_rises(costs: Sequence[float], where: str) -> None:
        """Refuse costs that fall as more steps are skipped: the planner adds up what each further step costs."""
        for skipped, (fewer, more) in enumerate(itertools.pairwise(costs), start=2):
            if more < fewer:
                raise ValueError(
                    f"{where} says that {skipped} skipped steps cost {more:g}, allowed is at least "
                    f"the {fewer:g} of {skipped - 1}"
                )


def calibration_name(key: CalibrationKey, predictor: Predictor, spans: Sequence[CachingSpan]) -> str:
    """Return what tells a calibration apart from a bundle's others, as the stem of a file's name."""
    return f"{key.sampler}-{key.steps}-{key.guidance!r}-{predictor.label}{_spans_label(spans)}"


def _spans_label(spans: Sequence[CachingSpan]) -> str:
    """Return `-1-12` of one span, `-parts-1-12` of single parts in a row, and a hash of any others."""
    if not spans:
        return ""
    firsts = [span.first for span in spans]
    if len(spans) == 1:
        return f"-{firsts[0]}-{spans[0].stop}"
    if all(span.stop == span.first + 1 for span in spans) and firsts == list(range(firsts[0], firsts[-1] + 1)):
        return f"-parts-{firsts[0]}-{spans[-1].stop}"
    digest = hashlib.sha256(repr([(span.first, span.stop) for span in spans]).encode()).hexdigest()
    return f"-spans-{digest[:12]}"


def calibration_from_json(text: str | bytes, *, where: str, bundle: str = "BUNDLE") -> Calibration:
    """Parse and validate a calibration file.

    Args:
        text: Its content.
        where: Its path, for the message.
        bundle: The bundle's, for the command that makes it again.

    Raises:
        CalibrationError: If it is not one of this schema, or holds what no calibration can.
    """
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        raise _unusable(where, first_fault(error), _made_for(text), bundle) from error


def check_blocks(calibration: Calibration, model: ModelSpec, *, where: str, bundle: str = "BUNDLE") -> None:
    """Refuse a calibration that was made for another number of block parts than its bundle has.

    Raises:
        CalibrationError: If so.
    """
    found, blocks = len(calibration.paper_floors), len(model.units)
    if found != blocks:
        fault = f"paper_floors holds {found} numbers, allowed are {blocks}: one for each block part of the bundle"
        raise _unusable(where, fault, calibration, bundle)


class _MadeFor(BaseModel):
    """What a calibration is for, read also from a file that is not one otherwise."""

    key: CalibrationKey
    predictor: Predictor


def _made_for(text: str | bytes) -> _MadeFor | None:
    try:
        return _MadeFor.model_validate_json(text)
    except ValidationError:
        return None


def _unusable(where: str, fault: str, made_for: _MadeFor | Calibration | None, bundle: str) -> CalibrationError:
    command = f"adacorr-calibrate {bundle}"
    if made_for and made_for.predictor.kind.cache is not SpanCache.RESIDUAL:
        command = calibrate_command(bundle, made_for.key, made_for.predictor)
    return CalibrationError(f"{where}: {fault}. Make it again with: {command}")


def calibrate_command(
    bundle: str, key: CalibrationKey, predictor: Predictor | None, *, policy: str | None = None
) -> str:
    """Return the command that makes the calibration of a key and, where given, of a predictor or for a policy."""
    guidance = repr(key.guidance).removesuffix(".0")
    wanted = f" --predictor {predictor.kind.value} --order {predictor.order}" if predictor else ""
    if predictor and predictor.revision is not Revision.NONE:
        wanted += f" --revision {predictor.revision.value}"
    wanted = f" --policies {word_for_commands(policy)}" if policy else wanted
    return f"adacorr-calibrate {bundle} --sampler {key.sampler} --steps {key.steps} --guidance {guidance}{wanted}"


def calibration_for_run(
    calibrations: Iterable[Calibration],
    key: CalibrationKey,
    predictor: Predictor | None,
    *,
    policy: str,
    bundle: str = "BUNDLE",
    spans: tuple[CachingSpan, ...] = (),
) -> Calibration:
    """Return the calibration that holds for `key` and, where given, was made for `predictor` and its `spans`.

    Raises:
        CalibrationError: If none does; the message says how one of them differs, and how to make one.
    """
    found = list(calibrations)
    matching = [calibration for calibration in found if calibration.key == key]
    for calibration in matching:
        if predictor is None or (calibration.predictor, calibration.spans) == (predictor, spans):
            return calibration
    if matching and predictor is not None:
        made = ", ".join(sorted({f"{each.predictor.label}{_spans_label(each.spans)}" for each in matching}))
        reason = f"the bundle's are for predictor {made}, not {predictor.label}{_spans_label(spans)}"
    elif found:
        reason = f"the bundle's is for another run ({found[0].key.difference(key)})"
    else:
        reason = "the bundle holds none"
    raise CalibrationError(
        f"policy {policy} needs a calibration; {reason}. Make one with: "
        f"{calibrate_command(bundle, key, predictor, policy=policy if spans else None)}, "
        f"or choose a --policy of {UNCALIBRATED}."
    )
