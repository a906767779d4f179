"""Running a controller as the loop does, on signals that a test writes down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.controllers import Run, controller_for_policy
from adacorr_deploy.caching.decisions import Action, Controller, Decision, Measured, Signals, SlotHistory
from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.caching.profile import Profile

Source = Callable[[int, int], Sequence[Signals]]  # step, span → one per branch


def change(relative: float, *, norm: float = 1.0, probe: float | None = None) -> Signals:
    """Signals of a tensor whose mean and root mean square changed by the same share of what they were."""
    return Signals(
        relative_offset=relative,
        relative_offset_p95=relative,
        spatial_change=0.0,
        paper_temporal=relative * norm,
        paper_spatial=0.0,
        change_l1=relative * norm,
        reference_l1=norm,
        change_square=(relative * norm) ** 2,
        reference_square=norm**2,
        probe=probe,
    )


def steadily(relative: float, *, norm: float = 1.0) -> Source:
    return lambda step, span: [change(relative, norm=norm)] * 2


def each_step(relatives: Sequence[float]) -> Source:
    """The change of step s is `relatives[s]`, whatever the span."""
    return lambda step, span: [change(relatives[step])] * 2


_CALM, _CHANGING = steadily(0.01), steadily(0.1)


@dataclass
class Driven:
    """What a controller decided, [step][span], and for what it asked."""

    decisions: list[list[Decision]] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)  # (step, span) whose signals were wanted

    def evaluated(self, span: int = 0) -> list[int]:
        return [step for step, row in enumerate(self.decisions) if row[span].action is not Action.REUSE]

    def scores(self, span: int = 0) -> list[float | None]:
        return [row[span].score for row in self.decisions]

    def reasons(self, span: int = 0) -> list[str]:
        return [row[span].reason for row in self.decisions]


def drive(
    controller: Controller,
    steps: int,
    *,
    signals: Source = _CALM,
    changes: Source = _CHANGING,
    error: float = 0.1,
    into: Driven | None = None,
) -> Driven:
    """Decide every span of every step, in the loop's order: signals, decision, prediction's error, change, refill.

    `into`, where given, is filled step by step, for signals that depend on what was decided.
    """
    driven = into or Driven()
    histories = [SlotHistory(capacity=3) for _ in controller.spans]
    for step in range(steps):
        row = []
        for span, history in enumerate(histories):
            measured = answered(controller, step, span, history, signals)
            if any(each is not None for each in measured):
                driven.asked.append((step, span))
            decision = controller.decide(step, span, history, measured)
            if decision.action is Action.REUSE:
                assert controller.prediction(step, span, history).coefficients
            else:
                _evaluate(controller, step, span, history, changes, error)
            row.append(decision)
        driven.decisions.append(row)
    return driven


def answered(controller: Controller, step: int, span: int, history: SlotHistory, signals: Source) -> Measured:
    """Answer whatever the controller asks for, with the same signals for every observation."""
    observations = controller.observations(span)
    wanted = controller.needs_signals(step, span, history) if history.steps else [False] * len(observations)
    assert len(wanted) == len(observations)
    return [signals(step, span) if asked else None for asked in wanted]


def _evaluate(
    controller: Controller, step: int, span: int, history: SlotHistory, changes: Source, error: float
) -> None:
    if history.steps and controller.measures_error(step, span, history):
        controller.record_error(step, span, error)
    if history.steps and controller.observes_change(step, span, history):
        controller.record_change(step, span, changes(step, span))
    history.record(step)


def made(
    policy: Policy,
    *,
    steps: int,
    blocks: int = 2,
    calibration: Calibration | None = None,
    profile: Profile | None = None,
    halves: bool = False,
    elements: int = 64,
    frames: int = 1,
) -> Controller:
    """A controller of a run."""
    run = Run(
        steps=steps,
        blocks=blocks,
        halves=(("attention", "mlp"),) * (blocks // 2) if halves else (),
        elements=elements,
        frames=frames,
    )
    return controller_for_policy(policy, run, calibration, profile)
