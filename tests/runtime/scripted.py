"""A controller that follows a script, and the same mathematics written down plainly, without rings or buffers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Decision,
    Measured,
    Observation,
    Observed,
    Prediction,
    Signals,
    SlotHistory,
    Span,
    unit_spans,
    whole_step_spans,
)
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.samplers import sampler_table
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.request import NoiseStream
from tests.runtime.tiny_dit import SCHEDULE, Array, TinyDiT, predict

Choice = Callable[[int, int], Action]


def always(action: Action) -> Choice:
    return lambda step, block: action


@dataclass
class Script:
    """What to do with each block at each step; a block without a filled slot is evaluated whatever the script says."""

    choose: Choice = field(default_factory=lambda: always(Action.EVALUATE))
    coefficients: tuple[float, ...] = (1.0,)  # newest evaluation first; as many as the slot has are used
    present_gates: bool = True  # whether the gates are those of the present step
    weight: float = 0.5
    references: bool = True
    wants_signals: bool = False
    measures: bool = False
    signals: dict[tuple[int, int], Sequence[Signals]] = field(default_factory=dict)
    errors: dict[tuple[int, int], float] = field(default_factory=dict)

    whole_steps: bool = False
    lags: bool = False
    revision: Revision = Revision.NONE

    blocks: int = 3

    @property
    def spans(self) -> tuple[Span, ...]:
        return whole_step_spans(self.blocks) if self.whole_steps else unit_spans(self.blocks)

    def observations(self, span: int) -> Sequence[Observation]:
        return (Observation(what=Observed.INPUT),) if self.references else ()

    def affine(self, span: int) -> Affine | None:
        return None

    def needs_signals(self, step: int, block: int, history: SlotHistory) -> Sequence[bool]:
        return [self.wants_signals] * len(self.observations(block))

    def decide(self, step: int, block: int, history: SlotHistory, signals: Measured) -> Decision:
        if signals and signals[0] is not None:
            self.signals[step, block] = signals[0]
        action = self.choose(step, block) if history.steps else Action.EVALUATE
        weight = self.weight if action is Action.CORRECT else None
        if weight is None:
            return Decision(action=action, reason="script", score=0.25)
        return Decision(action=action, reason="script", score=weight, weight=weight, thresholds=(0.0, 1.0, 1.0))

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        coefficients = self.coefficients[: len(history.steps)]
        gates = [step if self.present_gates else filled for filled in history.steps][: len(coefficients)]
        return Prediction(coefficients=coefficients, gate_steps=tuple(gates), onto_kept_input=True)

    def measures_error(self, step: int, block: int, history: SlotHistory) -> bool:
        return self.measures

    def record_error(self, step: int, block: int, error: float) -> None:
        self.errors[step, block] = error

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return False

    observes_motion = False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        raise AssertionError("never asked for")


@dataclass
class PlainSlot:
    evaluations: list[tuple[int, Array]] = field(default_factory=list)  # (step, units), newest first
    reference: Array | None = None


@dataclass
class PlainRun:
    """The method with nothing but lists: every intermediate result stays readable."""

    model: TinyDiT
    request: SampleRequest
    script: Script
    history: int
    inputs: dict[tuple[int, int], Array] = field(default_factory=dict)  # of each block at each step
    references: dict[tuple[int, int], Array] = field(default_factory=dict)  # its input at the evaluation before
    predicted: dict[tuple[int, int], Array] = field(default_factory=dict)  # from the present input
    outputs: dict[tuple[int, int], Array] = field(default_factory=dict)

    def latents(self) -> Array:
        """Run all steps and return the final latents."""
        request, model = self.request, self.model
        table = sampler_table(SCHEDULE, request.sampler, request.steps, eta=request.eta)
        stream = NoiseStream(request, model.spec.latent_shape)
        latents, draws = stream.at(0), itertools.count(1)
        carried = np.zeros_like(latents)
        tables = model.condition({"timesteps": table.timesteps, "labels": request.rows(model.spec.num_classes)})
        slots = [PlainSlot() for _ in model.spec.units]
        for step in range(request.steps):
            tokens = f32(model.embed({"latents": latents, "branches": np.ones(request.branches)})["tokens"])
            for block, slot in enumerate(slots):
                tokens = self._block(step, block, slot, tokens, f32(tables[f"modulation_{block:02d}"]))
            head = {
                "tokens": tokens,
                "modulation": tables["modulation_head"],
                "step": np.asarray([step]),
                "latents": latents,
                "guidance": request.branch_weights(),
                "coefficients": table.coefficients,
                "noise": stream.at(next(draws)) if table.coefficients[step, 2] else np.zeros_like(latents),
                "carried": carried,
            }
            results = model.head(head)
            latents, carried = f32(results["latents_out"]), f32(results["carried_out"])
        return latents

    def _block(self, step: int, block: int, slot: PlainSlot, tokens: Array, modulation: Array) -> Array:
        key = (step, block)
        action = self.script.choose(step, block) if slot.evaluations else Action.EVALUATE
        self.inputs[key] = tokens
        if slot.reference is not None:
            self.references[key] = slot.reference
            self.predicted[key] = self._cached(step, slot, tokens, modulation)
        if action is Action.REUSE:
            self.outputs[key] = self.predicted[key]
            return self.predicted[key]
        result = self.model.block(block, {"tokens": tokens, "modulation": modulation, "step": np.asarray([step])})
        fresh = f32(result.pop("tokens_out"))
        if action is Action.CORRECT:
            weight = np.float32(self.script.weight)
            output = (1 - weight) * self._cached(step, slot, self.references[key], modulation) + weight * fresh
        else:
            output = fresh
        slot.evaluations.insert(0, (step, np.stack([f32(unit) for unit in result.values()])))
        del slot.evaluations[self.history :]
        slot.reference = tokens
        self.outputs[key] = output
        return output

    def _cached(self, step: int, slot: PlainSlot, base: Array, modulation: Array) -> Array:
        used = slot.evaluations[: len(self.script.coefficients)]
        tensors: dict[str, NDArray[np.generic]] = {
            "tokens": base,
            "history": np.stack([units for _, units in used]),
            "modulation": modulation,
            "gate_steps": np.asarray([step if self.script.present_gates else filled for filled, _ in used]),
            "coefficients": np.asarray(self.script.coefficients[: len(used)], dtype=np.float32),
        }
        return f32(predict(tensors)["tokens_out"])


def f32(values: NDArray[np.generic]) -> Array:
    return np.asarray(values, dtype=np.float32)
