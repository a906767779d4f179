"""The contracts of a model's parts, whatever its family: their tensors, from what `ModelSpec` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS
from adacorr_deploy.core.specs import (
    MODULATIONS_PER_UNIT,
    DType,
    ModelSpec,
    PartSpec,
    TensorSpec,
    request_tensors,
)


@dataclass(frozen=True, slots=True)
class Contracts:
    """The specs of one model's parts.

    Attributes:
        model: What the runtime knows of it.
        context: What its condition part returns beside the modulations, (R, …) each.
    """

    model: ModelSpec
    context: tuple[TensorSpec, ...] = ()

    def embed(self, further: Iterable[str] = ()) -> PartSpec:
        """Return the spec of `embed`; `further`, here and below, names inputs that the modules take besides."""
        inputs = (self._image("latents"), self._branches(), *self._named(further))
        return PartSpec(name="embed", inputs=inputs, outputs=(self._tokens("tokens"),))

    def condition(self, inputs: Iterable[str]) -> PartSpec:
        known = request_tensors(self.model)
        outputs = (*self._modulations(), *self.context)
        return PartSpec(name="condition", inputs=tuple(known[name] for name in inputs), outputs=outputs)

    def block_part(self, index: int, further: Iterable[str] = ()) -> PartSpec:
        modulation = self._modulation("modulation", MODULATIONS_PER_UNIT * self.model.units[index])
        return PartSpec(
            name=self.model.block_names[index],
            inputs=(self._tokens("tokens"), modulation, self._step(), *self._named(further)),
            outputs=tuple(self._tokens(output) for output in ("tokens_out", *self.model.unit_names(index))),
        )

    def head(self) -> PartSpec:
        inputs = (self._tokens("tokens"), self._modulation("modulation", 2), self._step(), self._image("latents"))
        return PartSpec(name="head", inputs=(*inputs, *self._update()), outputs=self._results())

    def step(self, further: Iterable[str] = ()) -> PartSpec:
        """Return the spec of the chain embed, blocks, head as one part."""
        inputs = (self._image("latents"), self._branches(), *self._modulations(), self._step(), *self._update())
        return PartSpec(name="step", inputs=(*inputs, *self._named(further)), outputs=self._results())

    def _named(self, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        known = {**request_tensors(self.model), **{tensor.name: tensor for tensor in self.context}}
        return tuple(known[name] for name in names)

    def _modulations(self) -> tuple[TensorSpec, ...]:
        of_blocks = [
            self._modulation(f"modulation_{index:02d}", MODULATIONS_PER_UNIT * units)
            for index, units in enumerate(self.model.units)
        ]
        return (*of_blocks, self._modulation("modulation_head", 2))

    def _update(self) -> tuple[TensorSpec, ...]:
        guidance = TensorSpec(name="guidance", dtype=DType.FLOAT32, shape=(BRANCHES, BATCH))
        coefficients = TensorSpec(name="coefficients", dtype=DType.FLOAT32, shape=(STEPS, len(COLUMNS)))
        return guidance, coefficients, self._image("noise"), self._image("carried")

    def _results(self) -> tuple[TensorSpec, ...]:
        return self._image("latents_out"), self._image("model_output"), self._image("carried_out")

    def _tokens(self, name: str) -> TensorSpec:
        shape = (ROWS, self.model.latents.tokens_dim, self.model.width)
        return TensorSpec(name=name, dtype=self.model.precision, shape=shape)

    def _modulation(self, name: str, rows: int) -> TensorSpec:
        return TensorSpec(name=name, dtype=self.model.precision, shape=(STEPS, ROWS, rows, self.model.width))

    def _image(self, name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype=DType.FLOAT32, shape=(BATCH, *self.model.latents.dims))

    @staticmethod
    def _branches() -> TensorSpec:
        return TensorSpec(name="branches", dtype=DType.FLOAT32, shape=(BRANCHES,))

    @staticmethod
    def _step() -> TensorSpec:
        return TensorSpec(name="step", dtype=DType.INT64, shape=(1,))
