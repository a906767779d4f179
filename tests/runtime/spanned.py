"""A scripted controller over spans, and the same mathematics with lists: no rings, no launches, no third buffer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from adacorr_deploy.caching.decisions import (
    Action,
    Affine,
    Decision,
    Kept,
    Measured,
    Observation,
    Observed,
    Prediction,
    Signals,
    SlotHistory,
    Span,
    SpanCache,
)
from adacorr_deploy.core.samplers import sampler_table
from adacorr_deploy.plugins import oracle
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.request import NoiseStream
from tests.runtime.scripted import Script, f32
from tests.runtime.tiny_dit import SCHEDULE, UNITS, WIDTH, Array, Tensors, TinyDiT, predict

PARTS = len(UNITS)
PROBE = Observation(what=Observed.PROBE, weights=tuple(np.linspace(-1, 1, WIDTH).tolist()), bias=0.25)
AFFINE = Affine(scale=tuple(np.linspace(0.5, 1.5, WIDTH).tolist()), shift=tuple(np.linspace(-0.1, 0.1, WIDTH).tolist()))


@dataclass
class SpanScript(Script):
    """What to do with each span at each step; what keeps nothing, or has no filled slot yet, is evaluated."""

    division: tuple[Span, ...] = ()
    watched: Mapping[int, Sequence[Observation]] = field(default_factory=dict)
    affines: Mapping[int, Affine] = field(default_factory=dict)
    compares: bool = False
    measured: dict[tuple[int, int, int], Sequence[Signals]] = field(default_factory=dict)  # step, span, observation
    changes: dict[tuple[int, int], Sequence[Signals]] = field(default_factory=dict)

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.division

    def observations(self, span: int) -> Sequence[Observation]:
        return self.watched.get(span, ())

    def affine(self, span: int) -> Affine | None:
        return self.affines.get(span)

    def decide(self, step: int, block: int, history: SlotHistory, signals: Measured) -> Decision:
        self.measured |= {(step, block, n): each for n, each in enumerate(signals) if each is not None}
        if self.division[block].cache is SpanCache.NONE:
            return Decision(action=Action.EVALUATE, reason="keeps nothing")
        return Script.decide(self, step, block, history, signals)

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        coefficients = self.coefficients[: len(history.steps)]
        return Prediction(coefficients=coefficients, gate_steps=(step,) * len(coefficients))

    def observes_change(self, step: int, span: int, history: SlotHistory) -> bool:
        return self.compares and self.division[span].cache in (SpanCache.RESIDUAL, SpanCache.OUTPUT)

    observes_motion = False

    def record_change(self, step: int, span: int, signals: Sequence[Signals]) -> None:
        self.changes[step, span] = signals


@dataclass
class PlainSpans:
    """One request, with nothing but lists."""

    model: TinyDiT
    request: SampleRequest
    script: SpanScript
    history: int
    inputs: dict[tuple[int, int], Array] = field(default_factory=dict)  # of each span at each step
    residuals: dict[tuple[int, int], Array] = field(default_factory=dict)  # what each evaluated span added
    rows: dict[tuple[int, int, int], Array] = field(default_factory=dict)  # of each observation: signals, or probes
    change_rows: dict[tuple[int, int], Array] = field(default_factory=dict)
    _kept: dict[int, list[tuple[int, Array]]] = field(
        default_factory=dict
    )  # by span: (step, what is kept), newest first
    _watched: dict[tuple[int, int], Array] = field(default_factory=dict)  # span, observation: compared with this

    def latents(self) -> Array:
        """Run all steps and return the final latents."""
        request, model = self.request, self.model
        table = sampler_table(SCHEDULE, request.sampler, request.steps, eta=request.eta)
        latents = NoiseStream(request, model.spec.latent_shape).at(0)
        carried = np.zeros_like(latents)
        tables = model.condition({"timesteps": table.timesteps, "labels": request.rows(model.spec.num_classes)})
        for step in range(request.steps):
            tokens = f32(model.embed({"latents": latents, "branches": np.ones(request.branches)})["tokens"])
            for index in range(len(self.script.division)):
                tokens = self._span(step, index, tokens, tables)
            head = {
                "tokens": tokens,
                "modulation": tables["modulation_head"],
                "step": np.asarray([step]),
                "latents": latents,
                "guidance": request.branch_weights(),
                "coefficients": table.coefficients,
                "noise": np.zeros_like(latents),
                "carried": carried,
            }
            results = model.head(head)
            latents, carried = f32(results["latents_out"]), f32(results["carried_out"])
        return latents

    def _span(self, step: int, index: int, tokens: Array, tables: Tensors) -> Array:
        kept = self._kept.setdefault(index, [])
        self.inputs[step, index] = tokens
        action = self.script.choose(step, index) if kept else Action.EVALUATE
        for number, observation in enumerate(self.script.observations(index)):
            watched = self._observed(step, index, number, tables)
            if observation.kept is Kept.STEP or action is not Action.REUSE:
                self._watched[index, number] = watched
        if action is Action.EVALUATE:
            return self._evaluated(step, index, tokens, tables)
        predicted = self._predicted(step, index, tokens, tables)
        if action is Action.REUSE:
            return predicted
        weight = np.float32(self.script.weight)
        return f32((1 - weight) * predicted + weight * self._evaluated(step, index, tokens, tables))

    def _evaluated(self, step: int, index: int, tokens: Array, tables: Tensors) -> Array:
        span, kept = self.script.division[index], self._kept[index]
        output, units = tokens, np.empty(0, np.float32)
        for part in span.parts:
            results = self.model.block(
                part, {"tokens": output, "modulation": tables[f"modulation_{part:02d}"], "step": np.asarray([step])}
            )
            output = f32(results.pop("tokens_out"))
            units = f32(np.stack([f32(unit) for unit in results.values()]))
        self.residuals[step, index] = output - tokens
        if span.cache is SpanCache.RESIDUAL:
            if kept:
                self.change_rows[step, index] = oracle.signals(output - tokens, kept[0][1])
            kept.insert(0, (step, output - tokens))
        elif span.cache is SpanCache.UNITS:
            kept.insert(0, (step, units))
        del kept[self.history :]
        return output

    def _predicted(self, step: int, index: int, tokens: Array, tables: Tensors) -> Array:
        span, used = self.script.division[index], self._kept[index][: len(self.script.coefficients)]
        coefficients = f32(np.asarray(self.script.coefficients[: len(used)]))
        if span.cache is SpanCache.UNITS:
            tensors = {
                "tokens": tokens,
                "history": np.stack([units for _, units in used]),
                "modulation": tables[f"modulation_{span.first:02d}"],
                "gate_steps": np.asarray([step] * len(used)),
                "coefficients": coefficients,
            }
            return f32(predict(tensors)["tokens_out"])
        affine = self.script.affines.get(index)
        summed = sum(c * residual for c, (_, residual) in zip(coefficients, used, strict=True))
        if affine is None:
            return f32(tokens + summed)
        return f32(tokens + f32(np.asarray(affine.scale)) * summed + f32(np.asarray(affine.shift)))

    def _observed(self, step: int, index: int, number: int, tables: Tensors) -> Array:
        """Return what is observed now, and note the signals where the slot holds anything."""
        observation = self.script.observations(index)[number]
        first, tokens = self.script.division[index].first, self.inputs[step, index]
        modulation, at = f32(tables[f"modulation_{first:02d}"]), np.asarray([step])
        match observation.what:
            case Observed.INPUT:
                watched = tokens
            case Observed.RESIDUAL:
                watched = tokens - self.inputs[step, index - 1]
            case Observed.MODULATED:
                watched = f32(oracle.modulated(tokens, modulation, at))
            case Observed.PROBE:
                weights, bias = f32(np.asarray(observation.weights)), f32(np.asarray([observation.bias]))
                watched = oracle.probe(tokens, modulation, at, weights, bias)
        if self._kept.get(index):
            probes = observation.what is Observed.PROBE
            self.rows[step, index, number] = (
                watched if probes else oracle.signals(watched, self._watched[index, number])
            )
        return watched


@st.composite
def divisions(draw: st.DrawFn, parts: int = PARTS) -> tuple[Span, ...]:
    """Every division of the block parts that keeps something of blocks."""
    cuts = draw(st.sets(st.integers(1, parts - 1)))
    edges = [0, *sorted(cuts), parts]
    caches = (SpanCache.NONE, SpanCache.RESIDUAL, SpanCache.UNITS)
    return tuple(
        Span(first=first, stop=stop, cache=draw(st.sampled_from(caches if stop - first == 1 else caches[:2])))
        for first, stop in itertools.pairwise(edges)
    )


def at_random(actions: Sequence[Action], spans: int) -> Callable[[int, int], Action]:
    return lambda step, span: actions[(step * spans + span) % len(actions)]
