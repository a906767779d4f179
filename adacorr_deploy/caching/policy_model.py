"""A policy: the pieces of a caching method under one name, and which pieces go together."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from adacorr_deploy.caching.decisions import Placement, Span, SpanCache
from adacorr_deploy.caching.gates.accumulated import EasyCacheGate, MagCacheGate, TeaCacheGate
from adacorr_deploy.caching.gates.adacorrection import (
    AdaCorrectionGate,
    AnyCorrection,
    Correction,
    Corrector,
    PaperCorrection,
    PaperEquations,
    PaperGate,
)
from adacorr_deploy.caching.gates.codebook import AdaCacheGate
from adacorr_deploy.caching.gates.error_tables import BlockCachingGate, SmoothCacheGate
from adacorr_deploy.caching.gates.steps import (
    FewerStepsGate,
    IntervalGate,
    MaskGate,
    NoGate,
    RouterGate,
    ScheduleGate,
)
from adacorr_deploy.caching.gates.thresholds import FastCacheGate, FirstBlocksGate, LazyGate, PruneGate
from adacorr_deploy.caching.granularity import Granularity, Spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.caching.run import Run
from adacorr_deploy.caching.schedule import evaluations_for_speedup

AFFINE_QUANTITY = "affine"  # what an affine predictor looks up in a profile


def _shown_name(name: str) -> str:
    if not (1 <= len(name) <= 80 and name.isprintable()):  # terminals obey control characters
        raise ValueError("allowed are 1 to 80 printable characters")
    return name


PolicyName = Annotated[str, AfterValidator(_shown_name)]

Gate = Annotated[
    NoGate
    | FewerStepsGate
    | IntervalGate
    | ScheduleGate
    | MaskGate
    | RouterGate
    | SmoothCacheGate
    | BlockCachingGate
    | LazyGate
    | FastCacheGate
    | TeaCacheGate
    | AdaCacheGate
    | FirstBlocksGate
    | PruneGate
    | MagCacheGate
    | EasyCacheGate
    | AdaCorrectionGate
    | PaperGate,
    Field(discriminator="kind"),
]


class Policy(BaseModel):
    """How blocks are evaluated, reused or corrected during a request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PolicyName
    gate: Gate
    predictor: Predictor = Predictor()
    guards: Guards = Guards()
    decide: Placement | None = None  # one of `placements`; None: the first of them
    spans: Spans | None = None  # None: as the predictor's cache has it
    correction: AnyCorrection | None = None  # AdaCorrection on top of the gate

    @property
    def division(self) -> Spans:
        """How block parts are divided: as `spans` says, or by what the predictor needs to be kept."""
        if self.spans is not None:
            return self.spans
        match self.predictor.kind.cache:
            case SpanCache.OUTPUT:
                return Spans(granularity=Granularity.STEP)
            case SpanCache.RESIDUAL:
                return Spans(granularity=Granularity.RANGE)
            case _:
                return Spans(granularity=Granularity.PARTS)

    def spans_of(self, run: Run) -> tuple[Span, ...]:
        """Return the spans of a run.

        Raises:
            PolicyError: If the bundle has too few blocks.
        """
        return self.division.of_run(run, self.predictor.kind.cache, policy=self.name)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """When the policy can read what it decides with; none for one that reads nothing."""
        match self.gate:
            case AdaCorrectionGate():
                return (Placement.STEP, Placement.LAG)
            case PaperGate() if self.predictor.history == 1:
                return (Placement.BLOCK, Placement.DEVICE)
            case gate if not gate.observes and not (self.correction is not None and self.correction.observes):
                return ()
            case _ if self.division.granularity is Granularity.PARTS:
                return (Placement.BLOCK,)
            case _:
                return (Placement.STEP,)

    @property
    def placement(self) -> Placement | None:
        """When it reads what it decides with: as `decide` says, or the first that it can; None if it reads nothing."""
        return self.decide or next(iter(self.placements), None)

    @property
    def lags(self) -> bool:
        return self.placement is Placement.LAG

    @property
    def caches(self) -> bool:
        """Whether anything is kept at all."""
        return not isinstance(self.gate, NoGate | FewerStepsGate)

    @property
    def needs_calibration(self) -> bool:
        """Whether it reads a calibration: what skipping costs, or the floors of the paper's score."""
        equations = self.correction if isinstance(self.correction, PaperCorrection) else self.gate
        return self.needs_costs or (isinstance(equations, PaperEquations) and equations.is_lazy)

    @property
    def needs_costs(self) -> bool:
        """Whether it reads what skipping costs: of its own predictor and spans, where floors are of any calibration."""
        return isinstance(self.gate, ScheduleGate | AdaCorrectionGate) or isinstance(self.correction, Correction)

    @property
    def quantities(self) -> frozenset[str]:
        """What it looks up in a profile: values of `caching.profile.Quantity`."""
        found = {self.gate.quantity, AFFINE_QUANTITY if self.predictor.kind is PredictorKind.AFFINE else ""}
        return frozenset(found - {""}) if self.caches else frozenset()

    @property
    def looks_up(self) -> bool:
        """Whether it needs anything that is measured beforehand, a calibration or a profile."""
        return self.needs_calibration or bool(self.quantities)

    @property
    def revision(self) -> Revision:
        """How skipped steps are taken again; not at all where nothing is skipped."""
        return self.predictor.revision if self.caches else Revision.NONE

    @property
    def history(self) -> int:
        """Evaluations that a slot must keep: 0 where nothing is cached."""
        return self.predictor.history if self.caches else 0

    def sampled_steps(self, steps: int) -> int:
        """Return how many steps the sampler takes where `steps` were asked for."""
        return (
            max(1, evaluations_for_speedup(steps, self.gate.speedup))
            if isinstance(self.gate, FewerStepsGate)
            else steps
        )

    @model_validator(mode="after")
    def _decides_where_it_can(self) -> Policy:
        if self.decide is not None and self.decide not in self.placements:
            known = ", ".join(placement.value for placement in self.placements) or "nothing: it measures nothing"
            raise ValueError(f"decide is {self.decide.value}; this gate, with this predictor, takes {known}")
        return self

    @model_validator(mode="after")
    def _revises_on_the_host(self) -> Policy:
        if self.decide is Placement.DEVICE and self.revision is not Revision.NONE:
            raise ValueError(
                f"predictor.revision is {self.revision.value}, which takes steps again; decide device takes none"
            )
        return self

    @model_validator(mode="after")
    def _predictor_fits_spans(self) -> Policy:
        kind, division = self.predictor.kind, self.division
        allowed = _GRANULARITIES_OF_CACHE[kind.cache]
        if division.granularity not in allowed:
            raise ValueError(
                f"spans.granularity is {division.granularity.value}; predictor {kind.value} takes "
                f"{' or '.join(each.value for each in allowed)}"
            )
        if division.granularity is Granularity.STEP and (division.first or division.last):
            raise ValueError("spans.first and spans.last are of blocks; whole steps have none")
        if kind.cache is SpanCache.OUTPUT and self._blends:
            raise ValueError(f"predictor {kind.value} stands for whole steps and can't blend blocks")
        if kind.cache is SpanCache.OUTPUT and self.guards.protected_blocks:
            raise ValueError(f"predictor {kind.value} stands for whole steps and can't protect blocks")
        if isinstance(self.gate, PaperGate) and kind.cache is not SpanCache.UNITS:
            raise ValueError(f"predictor {kind.value} keeps residuals; gate paper blends with what units were")
        return self

    @model_validator(mode="after")
    def _gate_fits_spans(self) -> Policy:
        gate, division = self.gate, self.division
        if division.granularity not in gate.granularities:
            known = " or ".join(each.value for each in gate.granularities)
            raise ValueError(f"spans.granularity is {division.granularity.value}; gate {gate.kind} takes {known}")
        if isinstance(gate, AdaCacheGate) and self.predictor.kind.cache is SpanCache.UNITS:
            raise ValueError(
                f"predictor {self.predictor.kind.value} keeps units; gate {gate.kind} compares what is kept: give one "
                "of residuals or output-taylor"
            )
        if isinstance(gate, FirstBlocksGate) and not division.first:
            raise ValueError(f"gate {gate.kind} measures the first blocks: give spans.first, 1 or more")
        if isinstance(gate, AdaCorrectionGate | PaperGate) and (division.first or division.last):
            raise ValueError(f"gate {gate.kind} decides over all blocks; leave out spans.first and spans.last")
        return self

    @model_validator(mode="after")
    def _correction_has_a_base(self) -> Policy:
        if self.correction is None:
            return self
        if not self.caches or isinstance(self.gate, AdaCorrectionGate | PaperGate):
            why = "keeps nothing" if not self.caches else "is AdaCorrection itself"
            raise ValueError(f"correction stands on top of another gate; {self.gate.kind} {why}")
        is_cheap = isinstance(self.correction, Correction) and self.correction.corrector is Corrector.CHEAP
        if is_cheap and self.division.granularity is not Granularity.PARTS:
            raise ValueError("correction.corrector is cheap, which decides over halves: spans.granularity parts")
        return self

    @model_validator(mode="after")
    def _gate_alone_is_not_cheap(self) -> Policy:
        if isinstance(self.gate, AdaCorrectionGate) and self.gate.corrector is Corrector.CHEAP:
            raise ValueError("gate.corrector is cheap, which is for a correction on top of another gate")
        return self

    @property
    def _blends(self) -> bool:
        pieces = (self.gate, self.correction)
        return any(isinstance(each, PaperEquations) for each in pieces) or Corrector.PAPER in (
            getattr(each, "corrector", None) for each in pieces
        )


_GRANULARITIES_OF_CACHE = {
    SpanCache.UNITS: (Granularity.PARTS,),
    SpanCache.RESIDUAL: (Granularity.RANGE, Granularity.PARTS),
    SpanCache.OUTPUT: (Granularity.STEP,),
}
