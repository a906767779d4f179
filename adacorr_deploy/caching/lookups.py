"""What a policy looks up for one request: in the calibration, and in the profile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adacorr_deploy.caching.calibration import Calibration, CalibrationKey, caching_spans, calibrate_command
from adacorr_deploy.caching.decisions import Affine, Observation, Observed, Span, SpanCache
from adacorr_deploy.caching.gates.rule import ErrorTable
from adacorr_deploy.caching.planner import planner_for
from adacorr_deploy.caching.policy import word_for_commands
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.profile import Profile, Quantity
from adacorr_deploy.caching.run import Run
from adacorr_deploy.core.errors import CalibrationError

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLookups:
    """`gates.rule.Lookups` for one request: each method raises CalibrationError where something is missing."""

    settings: Policy
    run: Run
    spans: tuple[Span, ...]
    made: Calibration | None
    profile: Profile | None

    @property
    def policy(self) -> str:
        return self.settings.name

    @property
    def calibration(self) -> Calibration:
        """The calibration, checked to be for the policy's predictor and spans."""
        if self.made is None:
            raise CalibrationError(f"policy {self.policy} needs a calibration. Make one with adacorr-calibrate.")
        wanted = self.settings.predictor
        if self.made.predictor != wanted:
            raise CalibrationError(
                f"policy {self.policy} predicts by {wanted.label}, the calibration was made for "
                f"{self.made.predictor.label}. Calibrate with: {self._calibrate_command(self.made.key)}"
            )
        if self.made.spans != caching_spans(self.spans):
            raise CalibrationError(
                f"policy {self.policy} keeps residuals of other spans than the calibration was made for. "
                f"Calibrate with: {self._calibrate_command(self.made.key)}"
            )
        return self.made

    def _calibrate_command(self, key: CalibrationKey) -> str:
        policy = self.policy if caching_spans(self.spans) else None
        return calibrate_command("BUNDLE", key, self.settings.predictor, policy=policy)

    @property
    def paper_floors(self) -> Sequence[float]:
        """The floors of any predictor's calibration: the paper's score does not depend on it."""
        if self.made is None:
            raise CalibrationError(f"policy {self.policy} needs a calibration. Make one with adacorr-calibrate.")
        return self.made.paper_floors

    def scheduled_steps(self, speedup: float) -> Collection[int]:
        planner = planner_for(self.calibration, self.settings.guards)
        return frozenset(planner.plan(planner.price(speedup)).evaluated_steps())

    def output_change(self) -> Callable[[float], float]:
        return self._held(Quantity.OUTPUT_CHANGE, self.profile.output_change if self.profile else None).at

    def magnitude_ratios(self) -> Sequence[float]:
        return self._held(Quantity.MAGNITUDE_RATIOS, self.profile.magnitude_ratios if self.profile else None)

    def unit_errors(self) -> Mapping[str, ErrorTable]:
        errors = self._held(Quantity.UNIT_ERRORS, self.profile.unit_errors if self.profile else None)
        if lacking := [kind for kind in self.run.kinds if kind not in errors]:
            raise CalibrationError(
                f"policy {self.settings.name}: the profile has no unit_errors of {lacking[0]}, only of "
                f"{', '.join(errors)}. Calibrate the bundle again."
            )
        return errors

    def part_errors(self) -> Sequence[ErrorTable]:
        return self._held(Quantity.PART_ERRORS, self.profile.part_errors if self.profile else None)

    def probes(self) -> Sequence[Observation]:
        gates = self._held(Quantity.GATES, self.profile.gates if self.profile else None)
        chosen = [gates[span.first] for span in self.spans]
        return [Observation(what=Observed.PROBE, weights=gate.weights, bias=gate.bias) for gate in chosen]

    def affines(self) -> Sequence[Affine | None]:
        """The calibrated maps of an affine predictor, per span; none of other predictors."""
        if Quantity.AFFINE.value not in self.settings.quantities:
            return ()
        return [self._affine(span) if span.cache is not SpanCache.NONE else None for span in self.spans]

    def _affine(self, span: Span) -> Affine:
        found = self.profile.affine_map(span.first, span.stop) if self.profile else None
        if found is None:
            raise self._missing(f"the affine map of the block parts {span.first} … {span.stop - 1}")
        return Affine(scale=found.scale, shift=found.shift)

    def _held(self, quantity: Quantity, value: _Found | None) -> _Found:
        if value is None:
            raise self._missing(quantity.value)
        return value

    def _missing(self, what: str) -> CalibrationError:
        return CalibrationError(
            f"policy {self.policy} needs a profile of the model that holds {what}. Measure it with: "
            f"adacorr-calibrate BUNDLE --policies {word_for_commands(self.policy)}"
        )
