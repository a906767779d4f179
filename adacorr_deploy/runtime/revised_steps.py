"""Taking skipped steps again, once the model was evaluated after them (`caching.revision`)."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from adacorr_deploy.caching.decisions import Action, Prediction
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.runtime.workspace import Workspace


@dataclass(slots=True, kw_only=True)
class RevisedSteps:
    """The steps of one request: which were skipped since the model was last evaluated, and what they began with."""

    space: Workspace
    revision: Revision
    _skipped: int | None = 0  # in a row; None: not one after the other, since a step was evaluated in part

    def finished(self, step: int, actions: Set[Action]) -> None:
        """Take note of a step whose latents stand ready; if all of it was evaluated, revise those that led to it.

        What a step evaluated in part, or blended, an interpolation would throw away: nothing is revised across it.

        Args:
            step: The step.
            actions: Of all its spans that keep anything.
        """
        if self.revision is Revision.NONE:
            return
        if actions <= {Action.EVALUATE}:
            if self._skipped:
                self.space.restore_latents(step - self._skipped)
                take_again(self.space, self.revision, step - self._skipped, step)
            self._skipped = 0
        elif actions == {Action.REUSE} and self._skipped is not None:
            if not self._skipped:
                self.space.keep_latents(step)
            self._skipped += 1
        else:
            self._skipped = None


def take_again(space: Workspace, revision: Revision, first: int, evaluated: int) -> None:
    """Take the steps `first` … `evaluated` on outputs that are known now; the last of them is the output slot's newest.

    The latents that `first` starts from stand where it reads them.
    """
    slot = space.slots.output
    for step in range(first, evaluated + 1):
        weights = revision.coefficients(step, slot.history.steps) if step < evaluated else (1.0,)
        space.begin_step(step, None)
        space.extrapolate(step, None, slot.window(Prediction(coefficients=weights, gate_steps=(step,) * len(weights))))
