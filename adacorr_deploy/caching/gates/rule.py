"""What every gate is made of: validated settings, and the rule that decides for one request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from adacorr_deploy.caching.decisions import Action, Decision, Observation, Signals, SlotHistory
from adacorr_deploy.caching.granularity import Granularity
from adacorr_deploy.caching.run import Run

Speedup = Annotated[float, Field(ge=1, le=20)]
Threshold = Annotated[float, Field(ge=0, le=1000)]


ErrorTable = Sequence[Sequence[float]]  # [step][age − 1]: relative error of reusing what was kept `age` steps before


class Lookups(Protocol):
    """What a gate may look up to make its rule: the request, and what calibration left.

    The methods raise CalibrationError, with the command to run, where the bundle has not what they return.
    """

    @property
    def policy(self) -> str:
        """Name of the policy, for messages."""
        ...

    @property
    def run(self) -> Run:
        """The request."""
        ...

    def scheduled_steps(self, speedup: float) -> Collection[int]:
        """Steps that the cheapest path evaluates at a target."""
        ...

    def output_change(self) -> Callable[[float], float]:
        """TeaCache's polynomial."""
        ...

    def magnitude_ratios(self) -> Sequence[float]:
        """MagCache's γ, per step."""
        ...

    def unit_errors(self) -> Mapping[str, ErrorTable]:
        """SmoothCache's errors, by kind of unit: of attention, of MLP, …."""
        ...

    def part_errors(self) -> Sequence[ErrorTable]:
        """Block Caching's errors, per block part."""
        ...

    def probes(self) -> Sequence[Observation]:
        """LazyDiT's gates, per span."""
        ...


class GateSettings(BaseModel):
    """Settings of a gate, as a policy file has them.

    Attributes:
        signal: What it decides by, in a few words, for the table of policies.
        paper: arXiv number of the publication; empty for what is ours or has none.
        knob: The field that a number after `@` in a policy's name sets; empty for none.
        knob_meaning: What that number is.
        granularities: How spans may be divided for it.
        quantity: What it looks up in a profile (a value of `caching.profile.Quantity`); empty for nothing.
        observes: Whether it asks for signals of a step before it decides on it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    signal: ClassVar[str] = "–"
    paper: ClassVar[str] = ""
    knob: ClassVar[str] = ""
    knob_meaning: ClassVar[str] = ""
    granularities: ClassVar[tuple[Granularity, ...]] = tuple(Granularity)
    quantity: ClassVar[str] = ""
    observes: ClassVar[bool] = False

    def rule(self, lookups: Lookups) -> Rule:
        """Return the gate's rule for one request.

        Raises:
            CalibrationError: If it looks up what the bundle has not.
            PolicyError: If it is for other runs or bundles than this.
        """
        raise AssertionError(f"{type(self).__name__} has a controller of its own")


class Rule:
    """A gate's decisions for one request. The loop's order in a step, for each span: see, propose, settle.

    The defaults are those of a rule that measures nothing.
    """

    planned: bool = False  # whether its proposals are known before the run
    observes_under_guards: bool = False  # whether it also needs the signals of steps that a guard evaluates
    observes_motion: bool = False  # whether the comparisons of `record_change` should say how much frames move

    def observation(self, span: int) -> Observation | None:
        """What is watched of the span."""
        return None

    def see(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        """Take a step's signals, one per branch."""

    def proposal(self, step: int, span: int, history: SlotHistory) -> Decision:
        """Return what the method would do; asked where no guard evaluates. `history` holds at least one evaluation."""
        raise NotImplementedError

    def settle(self, step: int, span: int, *, evaluated: bool) -> None:
        """Take what was done, by whoever decided it."""

    def observes_change(self, step: int, span: int) -> bool:
        """Whether the fresh cache entry of an evaluation is compared with the one before."""
        return False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        """Take that comparison, one per branch."""
        raise AssertionError("this rule observes no change")


def reuse_if(within: bool, reason: str, score: float | None = None) -> Decision:
    """Return a proposal: reuse where the score is within its limit."""
    return Decision(action=Action.REUSE if within else Action.EVALUATE, reason=reason, score=score)
