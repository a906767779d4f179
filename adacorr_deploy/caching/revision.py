"""Revision: skipped steps are taken again once the next evaluation is known.

While steps are skipped, what stands for the model's output comes from the evaluations before. The next evaluation
closes the interval: what was held or extrapolated can be interpolated. So the latents go back to where the skipped
steps began, and the sampler takes them again with outputs on the polynomial through the evaluations on both sides. No
block is launched for that. It is the corrector of UniPC (Zhao et al. 2023, arXiv 2302.04867), which uses an evaluation
once more to correct the step that led to it, over several of the sampler's own steps.

That evaluation was made at latents which the skipped steps had led astray, the further the more of them there were. So
`quadratic` takes interpolated outputs in part, s = 1 / (1 + (k - 1) / 4) for k skipped steps, and extrapolated ones for
the rest; `linear`, which is for what holds a residual and strays further than any interpolation, takes them whole. Both
were chosen by what they are worth on the demo model (adacorr_deploy/docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

from adacorr_deploy.caching.polynomials import polynomial_coefficients

_FALL: Final = 0.25  # of the trust in an interpolation, per further skipped step


class Revision(str, Enum):
    """Through which evaluations the outputs of skipped steps are laid once the later one is known."""

    NONE = "none"
    LINEAR = "linear"  # those on both sides
    QUADRATIC = "quadratic"  # and the one before them

    @property
    def evaluations(self) -> int:
        """Outputs that must be kept, the fresh one among them."""
        match self:
            case Revision.NONE:
                return 0
            case Revision.LINEAR:
                return 2
            case Revision.QUADRATIC:
                return 3

    def coefficients(self, step: int, evaluations: Sequence[int]) -> tuple[float, ...]:
        """Return the weights of the evaluations' outputs in that of a skipped step; they sum to 1.

        Args:
            step: Between the last two evaluations.
            evaluations: Their steps, newest first, at least two.
        """
        used = tuple(evaluations[: self.evaluations])
        between = polynomial_coefficients(step, used)
        if self is Revision.LINEAR:
            return between
        share = 1 / (1 + _FALL * (used[0] - used[1] - 2))
        before = (0.0, *polynomial_coefficients(step, used[1:]))
        return tuple(share * one + (1 - share) * other for one, other in zip(between, before, strict=True))
