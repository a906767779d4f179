"""Predictors: how a slot stands for a block that is not launched.

Every predictor is one linear form (METHOD §3), x + Σⱼ cⱼ Σᵤ gⱼᵤ ⊙ hⱼᵤ, over the attention and MLP results hⱼᵤ of the
last evaluations j. They differ in the coefficients c and in whose adaLN gates g they apply:

    hold           the last residual, with the gates it was made with (what most published methods reuse)
    taylor         residuals extrapolated to this step, by the polynomial through the last evaluations
    gated          the last results, with the gates of this step
    gated-taylor   results extrapolated to this step, with the gates of this step

Of a span that keeps what it adds to its input, r, the form is x + Σⱼ cⱼ·rⱼ, for a part or for a range of them:

    residual         the last residual
    residual-taylor  extrapolated as TaylorSeer does (arXiv 2503.06923): derivatives by recursive finite differences of
                     the last evaluations, Σᵢ dᵢ·kⁱ/i!, k steps after the last
    affine           x + scale ⊙ r + shift, per channel, fitted by calibration (Block Caching, arXiv 2312.03209)

`output-taylor` stands for a whole step: the model's guided output is extrapolated, and no block takes part. At equal ρ
it is as good as `gated-taylor` (figures in adacorr_deploy/docs/method.md), and it costs and keeps nothing, where
predicting every block costs ONNX Runtime 5 to 15 % of evaluating it on a CPU. So policies that decide over whole steps
use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from adacorr_deploy.caching.decisions import Prediction, SpanCache
from adacorr_deploy.caching.polynomials import difference_coefficients, polynomial_coefficients
from adacorr_deploy.caching.revision import Revision


class PredictorKind(str, Enum):
    HOLD = "hold"
    TAYLOR = "taylor"
    GATED = "gated"
    GATED_TAYLOR = "gated-taylor"
    OUTPUT_TAYLOR = "output-taylor"
    RESIDUAL = "residual"
    RESIDUAL_TAYLOR = "residual-taylor"
    AFFINE = "affine"

    @property
    def cache(self) -> SpanCache:
        """What a span must keep for it."""
        match self:
            case PredictorKind.OUTPUT_TAYLOR:
                return SpanCache.OUTPUT
            case PredictorKind.RESIDUAL | PredictorKind.RESIDUAL_TAYLOR | PredictorKind.AFFINE:
                return SpanCache.RESIDUAL
            case _:
                return SpanCache.UNITS

    @property
    def extrapolates(self) -> bool:
        return self in (
            PredictorKind.TAYLOR,
            PredictorKind.GATED_TAYLOR,
            PredictorKind.OUTPUT_TAYLOR,
            PredictorKind.RESIDUAL_TAYLOR,
        )

    @property
    def fresh_gates(self) -> bool:
        return self in (PredictorKind.GATED, PredictorKind.GATED_TAYLOR)


class Predictor(BaseModel):
    """What stands for what is skipped, and whether it is revised.

    Attributes:
        kind: See above.
        order: Of the polynomial that an extrapolating kind lays through the last evaluations.
        revision: How skipped steps are taken again once the next evaluation is known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: PredictorKind = PredictorKind.GATED_TAYLOR
    order: Annotated[int, Field(ge=1, le=2)] = 1
    revision: Revision = Revision.NONE

    @property
    def label(self) -> str:
        """`gated-taylor-1`, `hold`, `residual-linear`: the kind, and where it has them its order and its revision."""
        order = f"-{self.order}" if self.kind.extrapolates else ""
        revision = f"-{self.revision.value}" if self.revision is not Revision.NONE else ""
        return f"{self.kind.value}{order}{revision}"

    @property
    def history(self) -> int:
        """Evaluations that a slot must keep, 1 to 3."""
        return self.order + 1 if self.kind.extrapolates else 1

    @property
    def whole_step(self) -> bool:
        """Whether the model's output is predicted instead of each block's."""
        return self.kind is PredictorKind.OUTPUT_TAYLOR

    def prediction(self, step: int, evaluations: Sequence[int]) -> Prediction:
        """Return the coefficients for `step` from the evaluations at hand (steps, newest first, at least one).

        With fewer evaluations than the order needs, the order falls to what they allow.
        """
        used = tuple(evaluations[: self.history])
        by_differences = self.kind is PredictorKind.RESIDUAL_TAYLOR
        coefficients = (difference_coefficients if by_differences else polynomial_coefficients)(step, used)
        return Prediction(coefficients=coefficients, gate_steps=(step,) * len(used) if self.kind.fresh_gates else used)
