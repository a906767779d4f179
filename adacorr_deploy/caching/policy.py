"""Policies: a gate, a predictor and guards under one name; presets, and files for one's own.

A policy file is JSON or TOML with the fields of `Policy`, and is untrusted: unknown keys and values out of range are
refused with the field's name.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from adacorr_deploy.caching.decisions import Placement
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.schedule import evaluations_for_speedup
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.untrusted import bounded_file, clipped, first_fault, value_from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_FILE_BYTES: Final = 16 << 10  # tomllib takes seconds for more: its time grows with the square of a key's dots

Speedup = Annotated[float, Field(ge=1, le=20)]


def _shown_name(name: str) -> str:
    if not (1 <= len(name) <= 80 and name.isprintable()):  # terminals obey control characters
        raise ValueError("allowed are 1 to 80 printable characters")
    return name


PolicyName = Annotated[str, AfterValidator(_shown_name)]


class Corrector(str, Enum):
    """What AdaCorrection does with a weight between 0 and 1 (METHOD §3)."""

    DEFER = "defer"  # reuse while the request's error budget allows, else recompute
    PAPER = "paper"  # evaluate, then blend


class _Gate(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoGate(_Gate):
    """Every block is evaluated at every step."""

    kind: Literal["none"] = "none"


class FewerStepsGate(_Gate):
    """The baseline: the sampler takes fewer steps, each evaluated in full."""

    kind: Literal["fewer-steps"] = "fewer-steps"
    speedup: Speedup = 2.0


class IntervalGate(_Gate):
    """Evaluate every `interval`-th step: FORA (arXiv 2407.01425)."""

    kind: Literal["interval"] = "interval"
    interval: Annotated[int, Field(ge=1, le=100)] = 3


class ScheduleGate(_Gate):
    """Evaluate the steps of the calibrated shortest path with at most steps ÷ `speedup` evaluations."""

    kind: Literal["schedule"] = "schedule"
    speedup: Speedup = 2.0


class AdaCorrectionGate(_Gate):
    """AdaCorrection on the calibrated schedule: each request pays for the error that it measures (METHOD §3, `robust`).

    Attributes:
        speedup: Target of ideal speed-up over requests like the calibration's; a hard request takes more evaluations.
        gamma: γ of the weight.
        band: Half-width of the band between τ_reuse and τ_recompute around the allowance, as a share of it.
        adaptivity: How far a request's measured difficulty moves its price of an evaluation: with 0 all requests follow
            the schedule, with 1 hard ones are given evaluations until their error is that of the others.
        memory: Share that older evaluations keep in the measured difficulty of a request, per evaluation.
        offset_margin: A first block's √Ŝ above this multiple of the largest that calibration saw forces evaluation.
        corrector: What is done between the two thresholds.
    """

    kind: Literal["adacorrection"] = "adacorrection"
    speedup: Speedup = 2.0
    gamma: Annotated[float, Field(gt=0, le=100)] = 1.0
    band: Annotated[float, Field(ge=0, lt=1)] = 0.1
    adaptivity: Annotated[float, Field(ge=0, le=1)] = 0.5
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.3
    offset_margin: Annotated[float, Field(ge=1, le=1000)] = 1.5
    corrector: Corrector = Corrector.DEFER


class PaperGate(_Gate):
    """The paper's equations: S = Δ_temp² + λ·Δ_spatial, w = clip(γ·S, 0, 1) (arXiv 2602.13357).

    `lazy` subtracts the calibrated floor from S and does not launch a block whose w ≤ `epsilon`; without it every block
    is evaluated at every step and blended: the reference, which saves nothing.
    """

    kind: Literal["paper"] = "paper"
    lazy: bool = False
    gamma: Annotated[float, Field(gt=0, le=100)] = 1.0
    lambda_: Annotated[float, Field(ge=0, le=100, alias="lambda")] = 1.0
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.05

    @model_validator(mode="after")
    def _floor_fits_lambda(self) -> PaperGate:
        if self.lazy and self.lambda_ != 1.0:
            raise ValueError(f"lambda is {self.lambda_}; the calibrated floor of a lazy gate is made for 1")
        return self


Gate = Annotated[
    NoGate | FewerStepsGate | IntervalGate | ScheduleGate | AdaCorrectionGate | PaperGate, Field(discriminator="kind")
]


class Policy(BaseModel):
    """How blocks are evaluated, reused or corrected during a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PolicyName
    gate: Gate
    predictor: Predictor = Predictor()
    guards: Guards = Guards()
    decide: Placement | None = None  # one of `placements`; None: the first of them

    @property
    def placements(self) -> tuple[Placement, ...]:
        """When the policy can read what it decides with; none for one that reads nothing."""
        match self.gate:
            case PaperGate():
                return (Placement.BLOCK,)
            case AdaCorrectionGate():
                return (Placement.STEP, Placement.LAG)
            case _:
                return ()

    @property
    def placement(self) -> Placement | None:
        """When it reads what it decides with: as `decide` says, or the first that it can; None if it reads nothing."""
        return self.decide or next(iter(self.placements), None)

    @property
    def lags(self) -> bool:
        return self.placement is Placement.LAG

    @model_validator(mode="after")
    def _decides_where_it_can(self) -> Policy:
        if self.decide is not None and self.decide not in self.placements:
            known = ", ".join(placement.value for placement in self.placements) or "nothing: it measures nothing"
            raise ValueError(f"decide is {self.decide.value}; this gate takes {known}")
        return self

    @model_validator(mode="after")
    def _whole_steps_stay_whole(self) -> Policy:
        if not self.predictor.whole_step:
            return self
        if isinstance(self.gate, PaperGate) or getattr(self.gate, "corrector", None) is Corrector.PAPER:
            raise ValueError(f"predictor {self.predictor.kind.value} stands for whole steps and can't blend blocks")
        if self.guards.protected_blocks:
            raise ValueError(f"predictor {self.predictor.kind.value} stands for whole steps and can't protect blocks")
        return self

    @property
    def needs_calibration(self) -> bool:
        match self.gate:
            case ScheduleGate() | AdaCorrectionGate():
                return True
            case PaperGate(lazy=lazy):
                return lazy
            case _:
                return False

    @property
    def history(self) -> int:
        """Evaluations that a slot must keep: 0 where nothing is cached."""
        return 0 if isinstance(self.gate, NoGate | FewerStepsGate) else self.predictor.history

    def sampled_steps(self, steps: int) -> int:
        """Return how many steps the sampler takes where `steps` were asked for."""
        return (
            max(1, evaluations_for_speedup(steps, self.gate.speedup))
            if isinstance(self.gate, FewerStepsGate)
            else steps
        )


_HOLD: Final = Predictor(kind=PredictorKind.HOLD)
_OUTPUT: Final = Predictor(kind=PredictorKind.OUTPUT_TAYLOR)

PRESETS: Final[Mapping[str, Policy]] = {
    policy.name: policy
    for policy in (
        Policy(name="none", gate=NoGate()),
        Policy(name="fewer-steps", gate=FewerStepsGate()),
        Policy(
            name="fora",
            gate=IntervalGate(),
            predictor=Predictor(kind=PredictorKind.GATED),
            guards=Guards(max_age_steps=1000),  # the interval alone decides, as published
        ),
        Policy(name="scheduled", gate=ScheduleGate(), predictor=_OUTPUT),
        Policy(name="scheduled-blocks", gate=ScheduleGate()),
        Policy(name="robust", gate=AdaCorrectionGate(), predictor=_OUTPUT),
        Policy(name="robust-lag", gate=AdaCorrectionGate(), predictor=_OUTPUT, decide=Placement.LAG),
        Policy(name="robust-blocks", gate=AdaCorrectionGate()),
        Policy(name="paper-exact", gate=PaperGate(), predictor=_HOLD, guards=Guards(warmup_steps=1, final_steps=0)),
        Policy(name="paper-lazy", gate=PaperGate(lazy=True), predictor=_HOLD),
    )
}
DEFAULT_POLICY: Final = "robust"
UNCALIBRATED: Final = ", ".join(policy.name for policy in PRESETS.values() if not policy.needs_calibration)


def policy_named(name_or_file: str) -> Policy:
    """Return a preset, a preset with another target (`robust@2.5`, `fora@2`), or the policy of a JSON or TOML file.

    Raises:
        PolicyError: If there is no such preset or file, or a field is not valid.
    """
    name, at, target = name_or_file.partition("@")
    if name in PRESETS:
        return _with_speedup(PRESETS[name], target) if at else PRESETS[name]
    path = Path(name_or_file)
    if path.suffix in (".json", ".toml"):
        return policy_from_file(path)
    raise PolicyError(
        f"policy {clipped(name_or_file)} is neither a preset ({', '.join(PRESETS)}) nor a .json or .toml file."
    )


def policy_from_file(path: Path) -> Policy:
    """Read and validate a policy file.

    Raises:
        PolicyError: If it can't be read or parsed, is larger than 16 KiB, or a field is not valid.
    """
    try:
        text = bounded_file(path, limit_bytes=_MAX_FILE_BYTES).decode("utf-8")
        raw = tomllib.loads(text) if path.suffix == ".toml" else value_from_json(text)
    except OSError as error:
        raise PolicyError(f"policy file {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise PolicyError(f"policy file {path} can't be read: {error}") from error
    except RecursionError as error:
        raise PolicyError(f"policy file {path} can't be read: it is nested too deeply") from error
    return _validated(raw, where=f"policy file {path}")


def _with_speedup(policy: Policy, target: str) -> Policy:
    if isinstance(policy.gate, IntervalGate):
        field, allowed = "interval", "a whole number of steps"
    elif hasattr(policy.gate, "speedup"):
        field, allowed = "speedup", "a speed-up from 1 to 20"
    else:
        raise PolicyError(f"policy {policy.name} has no target: leave out {clipped('@' + target)}")
    raw = policy.model_dump(mode="json", by_alias=True)
    raw["name"] = f"{policy.name}@{target}"
    raw["gate"][field] = target
    return _validated(raw, where=f"policy {clipped(raw['name'])[1:-1]} (after @ stands {allowed})")


def _validated(raw: object, *, where: str) -> Policy:
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        raise PolicyError(f"{where}: {first_fault(error)}") from error
