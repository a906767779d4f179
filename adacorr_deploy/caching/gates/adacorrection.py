"""AdaCorrection's settings: alone and on top of another gate, with the calibrated weight or the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from adacorr_deploy.caching.gates.rule import GateSettings, Speedup
from adacorr_deploy.caching.granularity import Granularity


class Corrector(str, Enum):
    """What AdaCorrection does with a weight between 0 and 1 (METHOD §3)."""

    DEFER = "defer"  # reuse while the request's error budget allows, else recompute
    PAPER = "paper"  # evaluate, then blend
    CHEAP = "cheap"  # of a block in halves: the attention is reused, the MLP evaluated


class _Correcting(GateSettings):
    """What AdaCorrection alone and on top have in common.

    Attributes:
        speedup: Target of ideal speed-up over requests like the calibration's; a hard request takes more evaluations.
        gamma: γ of the weight.
        band: Half-width of the band between τ_reuse and τ_recompute around the allowance, as a share of it.
        adaptivity: How far a request's measured difficulty moves its price of an evaluation: with 0 all requests follow
            the schedule, with 1 hard ones are given evaluations until their error is that of the others.
        memory: Share that older evaluations keep in the measured difficulty of a request, per evaluation.
        corrector: What is done between the two thresholds.
    """

    paper: ClassVar[str] = "2602.13357"
    knob: ClassVar[str] = "speedup"
    knob_meaning: ClassVar[str] = "a speed-up from 1 to 20"

    speedup: Speedup = 2.0
    gamma: Annotated[float, Field(gt=0, le=100)] = 1.0
    band: Annotated[float, Field(ge=0, lt=1)] = 0.1
    adaptivity: Annotated[float, Field(ge=0, le=1)] = 0.5
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.3
    corrector: Corrector = Corrector.DEFER


class AdaCorrectionGate(_Correcting):
    """AdaCorrection (arXiv 2602.13357) on the calibrated schedule: a request pays for the error that it measures.

    Attributes:
        offset_margin: A first block's √Ŝ above this multiple of the largest that calibration saw forces evaluation.
    """

    signal: ClassVar[str] = "calibrated costs, measured error, Ŝ"
    observes: ClassVar[bool] = True

    kind: Literal["adacorrection"] = "adacorrection"
    offset_margin: Annotated[float, Field(ge=1, le=1000)] = 1.5


class Mode(str, Enum):
    """What weighs a correction on top of a gate."""

    ROBUST = "robust"  # calibrated costs and measured errors
    PAPER_LAZY = "paper-lazy"  # the paper's score, above a calibrated floor; nothing is launched where it is within ε
    PAPER_EXACT = "paper-exact"  # the paper's score; always evaluated, then blended: the reference, no speed-up


class Correction(_Correcting):
    """AdaCorrection (arXiv 2602.13357) on top (`NAME+adacorrection`): a gate proposes, the calibrated weight decides.

    ê and the allowance are those of the plan at the target's price, times the request's measured difficulty. w = 0:
    reuse, whatever the gate proposes; w = 1: evaluate; between, its proposal stands, a reuse as long as the error
    budget lasts, else it is corrected.

    Attributes:
        promote: Whether w = 0 reuses what the gate would evaluate; without it the gate's evaluations stand.
    """

    signal: ClassVar[str] = "calibrated costs, measured error"

    mode: Literal[Mode.ROBUST] = Mode.ROBUST
    promote: bool = True


class PaperEquations(GateSettings):
    """S = Δ_temp² + λ·Δ_spatial, w = clip(γ·S, 0, 1) (arXiv 2602.13357).

    Attributes:
        gamma: γ.
        lambda_: λ.
        epsilon: Where it is lazy, what w must exceed for a launch; S is then taken above a calibrated floor.
    """

    paper: ClassVar[str] = "2602.13357"
    observes: ClassVar[bool] = True

    gamma: Annotated[float, Field(gt=0, le=100)] = 1.0
    lambda_: Annotated[float, Field(ge=0, le=100, alias="lambda")] = 1.0
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.05

    @property
    def is_lazy(self) -> bool:
        raise NotImplementedError

    @model_validator(mode="after")
    def _floor_fits_lambda(self) -> PaperEquations:
        if self.is_lazy and self.lambda_ != 1.0:
            raise ValueError(f"lambda is {self.lambda_}; the calibrated floor of a lazy gate is made for 1")
        return self


class PaperGate(PaperEquations):
    """The paper's equations (arXiv 2602.13357) alone: a block whose w ≤ `epsilon` is not launched if `lazy`.

    Without it every block is evaluated at every step and blended: the reference, which saves nothing.
    """

    signal: ClassVar[str] = "S of each block's input"
    granularities: ClassVar[tuple[Granularity, ...]] = (Granularity.PARTS,)

    kind: Literal["paper"] = "paper"
    lazy: bool = False

    @property
    def is_lazy(self) -> bool:
        return self.lazy


class PaperCorrection(PaperEquations):
    """The paper's equations (arXiv 2602.13357) on a gate's reuses (`NAME+paper-lazy`, `NAME+paper-exact`).

    Where the gate reuses a span, S of the span's input, against that of its last evaluation, gives w: within `epsilon`
    the reuse stands, at 1 the span is recomputed, between it is evaluated and blended with what the reuse would have
    been. `paper-exact` always evaluates. Where the gate evaluates, nothing is changed: the paper promotes nothing.
    """

    signal: ClassVar[str] = "S of each span's input"

    mode: Literal[Mode.PAPER_LAZY, Mode.PAPER_EXACT]

    @property
    def is_lazy(self) -> bool:
        return self.mode is Mode.PAPER_LAZY


def _family(given: object) -> str | None:
    """Return the tag of the settings that a correction's mode means; without a mode it is robust."""
    mode = given.get("mode", Mode.ROBUST) if isinstance(given, Mapping) else getattr(given, "mode", None)
    if mode == Mode.ROBUST:
        return "robust"
    return "paper" if mode in (Mode.PAPER_LAZY, Mode.PAPER_EXACT) else None


AnyCorrection = Annotated[
    Annotated[Correction, Tag("robust")] | Annotated[PaperCorrection, Tag("paper")],
    Discriminator(
        _family,
        custom_error_type="mode",
        custom_error_message=f"mode must be one of {', '.join(mode.value for mode in Mode)}",
    ),
]
