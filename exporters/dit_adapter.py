"""DiT for the exporter: from a checkpoint to parts with their contracts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from diffusers import DiTTransformer2DModel
from torch import Tensor

from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS
from adacorr_deploy.core.specs import (
    BLOCK_UNITS,
    MODULATIONS_PER_UNIT,
    Dim,
    DType,
    ModelSpec,
    PartSpec,
    TensorSpec,
)
from adacorr_deploy.exporters.dit import ConditionPart, EmbedPart, HeadPart, StepPart, Unit, UnitsPart, units_of_block
from adacorr_deploy.exporters.dit_config import DiTConfig, empty_dit
from adacorr_deploy.exporters.dit_original import diffusers_from_original, is_original_dit, original_schedule
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.weight_files import StateDict, require_tensors


class DiTAdapter:
    """Builds DiT models from checkpoints."""

    family = "dit"

    def from_config(self, config: Mapping[str, object], state: StateDict, *, where: str) -> DiTModel:
        model = empty_dit(DiTConfig.checked(config, where=where))
        require_tensors(state, model.state_dict(), where=where, model="DiTTransformer2DModel")
        model.load_state_dict(state, assign=True, strict=True)
        return DiTModel(model.eval().requires_grad_(False))

    def is_original(self, state: StateDict) -> bool:
        return is_original_dit(state)

    def from_original(self, state: StateDict, *, where: str, heads: int | None) -> DiTModel:
        return DiTModel(diffusers_from_original(state, where=where, heads=heads))


@dataclass(frozen=True, slots=True)
class DiTModel:
    """A DiT with its weights, cut into parts on demand."""

    module: DiTTransformer2DModel

    @property
    def learned_variance(self) -> bool:
        return bool(self.module.out_channels == 2 * self.module.config.in_channels)

    def predict(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return diffusers' own output, (R, C or 2C, H, W)."""
        output: Tensor = self.module(latents, timestep=timesteps, class_labels=labels, return_dict=False)[0]
        return output

    def training_schedule(self) -> NoiseSchedule:
        return original_schedule(learned_variance=self.learned_variance)

    def spec(self, precision: DType, units: int) -> ModelSpec:
        config, grid = self.module.config, self.module.config.sample_size // self.module.config.patch_size
        return ModelSpec(
            family=DiTAdapter.family,
            precision=precision,
            latent_shape=(config.in_channels, config.sample_size, config.sample_size),
            tokens=grid**2,
            width=self.module.inner_dim,
            num_classes=config.num_embeds_ada_norm,
            units=tuple(len(part) for part in self._block_parts(units)),
            learned_variance=self.learned_variance,
        )

    def parts(self, precision: DType, units: int) -> Iterator[Part]:
        """Yield embed, condition, every block part and head."""
        spec = self.spec(precision, units)
        tensors = _Tensors(spec)
        yield Part(spec=tensors.embed(), module=EmbedPart(self.module).eval(), structure="embed")
        yield Part(
            spec=tensors.condition(), module=ConditionPart(self.module, spec.units).eval(), structure="condition"
        )
        for index, of_part in enumerate(self._block_parts(units)):
            part_spec = tensors.block_part(index)
            structure = " ".join(spec.unit_names(index))
            yield Part(spec=part_spec, module=UnitsPart(of_part).eval(), structure=structure)
        yield Part(spec=tensors.head(), module=HeadPart(self.module).eval(), structure="head")

    def step_part(self, precision: DType, units: int) -> Part:
        """Return embed, blocks and head as one part, with the same inputs as the chain and no units."""
        module = StepPart(self.module, self._block_parts(units)).eval()
        return Part(spec=_Tensors(self.spec(precision, units)).step(), module=module, structure="step")

    def _block_parts(self, size: int) -> list[list[Unit]]:
        """Return the units of each block part; only the last may have fewer than `size`."""
        if size < 1 or (size > 1 and size % BLOCK_UNITS):
            raise ValueError(f"a block part holds one unit or whole blocks of {BLOCK_UNITS}, got {size} units")
        units = iter([unit for block in self.module.transformer_blocks for unit in units_of_block(block)])
        return list(iter(lambda: list(islice(units, size)), []))


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The contracts of the parts of one model."""

    model: ModelSpec

    def embed(self) -> PartSpec:
        inputs = (self._image("latents"), self._branches())
        return PartSpec(name="embed", inputs=inputs, outputs=(self._tokens("tokens"),))

    def condition(self) -> PartSpec:
        timesteps = TensorSpec(name="timesteps", dtype=DType.FLOAT32, shape=(STEPS,))
        labels = TensorSpec(name="labels", dtype=DType.INT64, shape=(ROWS,))
        return PartSpec(name="condition", inputs=(timesteps, labels), outputs=self._modulations())

    def block_part(self, index: int) -> PartSpec:
        modulation = self._modulation("modulation", MODULATIONS_PER_UNIT * self.model.units[index])
        return PartSpec(
            name=self.model.block_names[index],
            inputs=(self._tokens("tokens"), modulation, self._step()),
            outputs=tuple(self._tokens(output) for output in ("tokens_out", *self.model.unit_names(index))),
        )

    def head(self) -> PartSpec:
        inputs = (self._tokens("tokens"), self._modulation("modulation", 2), self._step(), self._image("latents"))
        return PartSpec(name="head", inputs=(*inputs, *self._update()), outputs=self._results())

    def step(self) -> PartSpec:
        inputs = (self._image("latents"), self._branches(), *self._modulations(), self._step(), *self._update())
        return PartSpec(name="step", inputs=inputs, outputs=self._results())

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
        shape: tuple[Dim, ...] = (ROWS, self.model.tokens, self.model.width)
        return TensorSpec(name=name, dtype=self.model.precision, shape=shape)

    def _modulation(self, name: str, rows: int) -> TensorSpec:
        return TensorSpec(name=name, dtype=self.model.precision, shape=(STEPS, ROWS, rows, self.model.width))

    def _image(self, name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype=DType.FLOAT32, shape=(BATCH, *self.model.latent_shape))

    @staticmethod
    def _branches() -> TensorSpec:
        return TensorSpec(name="branches", dtype=DType.FLOAT32, shape=(BRANCHES,))

    @staticmethod
    def _step() -> TensorSpec:
        return TensorSpec(name="step", dtype=DType.INT64, shape=(1,))
