"""A workspace: the buffers of one run size, and what is launched over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.samplers import SamplerTable
from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT, DType, ModelSpec
from adacorr_deploy.engines.backend import Backend, Buffer, Launch, Session
from adacorr_deploy.plugins.kernels import NOISE_KERNEL
from adacorr_deploy.plugins.service_parts import SIGNALS_PART, blend_part_name, predict_part_name
from adacorr_deploy.runtime.bound_launches import BoundLaunches
from adacorr_deploy.runtime.buffers import (
    BlockBuffers,
    Factors,
    ImageBuffers,
    RunSize,
    allocate_block_buffers,
    allocate_image_buffers,
)
from adacorr_deploy.runtime.conditions import Prompts, condition_rows
from adacorr_deploy.runtime.request import NoiseStream, SampleRequest
from adacorr_deploy.runtime.slots import CacheSlot, SlotPool, Window, allocate_slots
from adacorr_deploy.runtime.span_launches import Allocate, SpanLaunches

if TYPE_CHECKING:
    from adacorr_deploy.runtime.device_steps import DecidedSteps

Noise = NDArray[np.float32] | int  # (B, C, H, W), or which draw of the request's own
Reading = Callable[[], NDArray[np.generic]]  # waits for what was measured, and returns it


class Workspace:
    """Runs parts over fixed buffers. It decides nothing: the loop says what to run, and in which order."""

    def __init__(
        self,
        model: ModelSpec,
        sessions: Mapping[str, Session],
        image: ImageBuffers,
        blocks: BlockBuffers,
        slots: SlotPool,
        fuse: Callable[[Sequence[Launch]], Launch | None],
        allocate: Allocate,
        null_prompt: Prompts | None = None,
    ) -> None:
        self._model = model
        self._null_prompt = null_prompt
        self.named = {**image.request, **blocks.context}  # what parts are given by the name of their input
        self.bound = BoundLaunches(sessions, self.named, fuse)
        self._factors_written: dict[int, Window] = {}
        self.image = image
        self.blocks = blocks
        self.slots = slots
        self.spans = SpanLaunches(self, model, allocate)
        self.decided_steps: dict[bool, DecidedSteps] = {}  # of runs that decide on the device, by whose gates they use

    # --- Around the blocks ---------------------------------------------------------------------------------------

    def prepare(self, request: SampleRequest, table: SamplerTable, latents: NDArray[np.float32] | None) -> None:
        """Write a request's inputs, and compute the modulation of all its steps in one launch.

        Without latents they are the request's first draw.
        """
        image = self.image
        rows = condition_rows(request, self._model, self._null_prompt)
        self._stream = NoiseStream(request, request.latent_shape(self._model))
        image.noise_keys.write(self._stream.keys)
        self._fill(image.latents[0], 0 if latents is None else latents)
        image.carried[0].write(np.zeros(image.carried[0].shape, dtype=np.float32))  # 0 · what was left could be NaN
        image.guidance.write(request.branch_weights())
        image.coefficients.write(table.coefficients)
        for name, values in {"timesteps": table.timesteps, **rows}.items():
            image.request[name].write(values)
        outputs = {f"modulation_{index:02d}": buffer for index, buffer in enumerate(self.blocks.modulation)}
        self.bound.run(("condition",), lambda: {**outputs, "modulation_head": self.blocks.modulation_head})

    def begin_step(self, step: int, noise: Noise | None) -> None:
        """Say which step is next, and what its head adds, to work that was bound before."""
        self.image.step.write(np.asarray([step], dtype=np.int64))
        if noise is not None:
            self._fill(self.image.noise, noise)

    def embed(self, step: int) -> None:
        """Start a step: latents → tokens."""
        self.begin_step(step, None)
        self.bound.run(
            ("embed", step % 2),
            lambda: {
                "latents": self.image.latents[step % 2],
                "branches": self.image.branches,
                "tokens": self.blocks.tokens[0],
            },
        )

    def head(self, step: int, noise: Noise | None) -> None:
        """End a step: tokens → guided model output (into the output slot's ring) → the next latents."""
        image = self.image
        entry = self.slots.output.next_entry
        if noise is not None:
            self._fill(image.noise, noise)
        self.bound.run(
            ("head", step % 2, entry),
            lambda: {
                "tokens": self.block_input(len(self._model.units)),
                "modulation": self.blocks.modulation_head,
                "step": image.step,
                "latents": image.latents[step % 2],
                "guidance": image.guidance,
                "coefficients": image.coefficients,
                "noise": image.noise,
                "carried": image.carried[step % 2],
                "latents_out": image.latents[(step + 1) % 2],
                "carried_out": image.carried[(step + 1) % 2],
                "model_output": self.slots.output.ring[entry][0],
            },
        )

    def extrapolate(self, step: int, noise: Noise | None, window: Window) -> None:
        """Let the output slot's prediction stand for the model: the next latents without a block."""
        if noise is not None:
            self._fill(self.image.noise, noise)
        after = (step + 1) % 2
        self._extrapolate(step, window, "reuse", (self.image.latents[after], self.image.carried[after]))

    def keep_latents(self, step: int) -> None:
        """Keep what a step started from, so that it can be taken again."""
        latents, carried = self.image.kept
        latents.copy_from(self.image.latents[step % 2])
        carried.copy_from(self.image.carried[step % 2])

    def restore_latents(self, step: int) -> None:
        """Put what was kept back to where `step`, which it was kept of, reads it."""
        latents, carried = self.image.kept
        self.image.latents[step % 2].copy_from(latents)
        self.image.carried[step % 2].copy_from(carried)

    def predict_output_aside(self, step: int, window: Window) -> None:
        """Predict the model's output without moving the latents."""
        self._extrapolate(step, window, "aside", (self.image.scratch, self.image.scratch_carried))

    def output_error(self, entry: int) -> Reading:
        """Compare the output predicted aside with the fresh one in a ring entry: relative error, (B,)."""
        image = self.image
        self.bound.run(
            ("output_error", entry),
            lambda: {
                "predicted": image.predicted_output,
                "fresh": self.slots.output.ring[entry][0],
                "error": image.output_error,
            },
        )
        return image.output_error.read_later()

    def _extrapolate(self, step: int, window: Window, use: str, results: tuple[Buffer, Buffer]) -> None:
        image = self.image
        factors = image.output_factors[window.entries - 1]
        factors.write(np.asarray(window.coefficients, dtype=np.float32))
        self.bound.run(
            (f"extrapolate_{window.entries}", use, step % 2, window.start),
            lambda: {
                "latents": image.latents[step % 2],
                "history": self.slots.output.ring[window.start : window.stop],
                "factors": factors,
                "step": image.step,
                "coefficients": image.coefficients,
                "noise": image.noise,
                "carried": image.carried[step % 2],
                "latents_out": results[0],
                "carried_out": results[1],
                "model_output": image.predicted_output,
            },
        )

    def _fill(self, target: Buffer, noise: Noise) -> None:
        """Write normals, or make those of a draw where the buffer is, if the backend does."""
        if isinstance(noise, int) and self.bound.has_part(NOISE_KERNEL):
            image = self.image
            image.noise_draw.write(np.asarray([noise], dtype=np.int64))
            self.bound.run(
                (NOISE_KERNEL, target.address),
                lambda: {"keys": image.noise_keys, "draw": image.noise_draw, "noise": target},
            )
        elif isinstance(noise, int):
            target.write(self._stream.at(noise))
        else:
            target.write(noise)

    def read_latents(self, step: int) -> NDArray[np.float32]:
        """Return a host copy of the latents that `step` made, (B, C, H, W)."""
        return np.asarray(self.image.latents[(step + 1) % 2].read(), dtype=np.float32)

    # --- Blocks --------------------------------------------------------------------------------------------------

    def block_input(self, block: int) -> Buffer:
        return self.blocks.tokens[self.blocks.places[block]]

    def block_output(self, block: int) -> Buffer:
        return self.blocks.tokens[self.blocks.places[block + 1]]

    def block_input_as_history(self, block: int) -> Buffer:
        """Return a block's input as a slot's ring of one residual, (1, 1, R, N, D): the same memory."""
        return self.blocks.histories[self.blocks.places[block]]

    def evaluate(self, block: int, slot: CacheSlot, *, aside: bool = False) -> None:
        """Run the block's engine: units to the slot's ring, output to the next block (or `aside`, to be corrected)."""
        entry = slot.next_entry

        def tensors() -> dict[str, Buffer]:
            units = slot.ring[entry]
            return {
                "tokens": self.block_input(block),
                "modulation": self.blocks.modulation[block],
                "step": self.image.step,
                "tokens_out": self.blocks.fresh if aside else self.block_output(block),
                **{name: units[unit] for unit, name in enumerate(self._model.unit_names(block))},
            }

        self.bound.run((self._model.block_names[block], entry, int(aside)), tensors)

    def evaluate_fused(self, first: int, slots: Sequence[CacheSlot]) -> bool:
        """Run consecutive blocks in one launch, if the backend makes one of those that have run: say whether."""
        names = self._model.block_names[first : first + len(slots)]
        return self.bound.run_fused([(name, slot.next_entry, 0) for name, slot in zip(names, slots, strict=True)])

    def reuse(self, block: int, slot: CacheSlot, window: Window) -> None:
        """Let the slot's prediction stand for the block's output."""
        self._predict(block, slot, window, "reuse", self.block_input(block), self.block_output(block))

    def predict_aside(self, block: int, slot: CacheSlot, window: Window) -> None:
        """Predict from the block's present input into the estimate buffer."""
        self._predict(block, slot, window, "aside", self.block_input(block), self.blocks.estimate)

    def predict_cached(self, block: int, slot: CacheSlot, window: Window) -> None:
        """Compute the cached output into the estimate buffer: the input of the last evaluation, plus the residual."""
        self._predict(block, slot, window, "cached", slot.kept_reference, self.blocks.estimate)

    def _predict(
        self, block: int, slot: CacheSlot, window: Window, use: str, tokens: Buffer, tokens_out: Buffer
    ) -> None:
        factors = self.factors(window)
        self.bound.run(
            (self._predict_part(block, window.entries), use, block, window.start),
            lambda: {
                "tokens": tokens,
                "history": slot.ring[window.start : window.stop],
                "modulation": self.blocks.modulation[block],
                "gate_steps": factors.gate_steps,
                "coefficients": factors.coefficients,
                "tokens_out": tokens_out,
            },
        )

    def factors(self, window: Window) -> Factors:
        """Return the buffers with a window's factors; most blocks of a step share them, so they are written once."""
        factors = self.blocks.factors[window.entries - 1]
        written = self._factors_written.pop(window.entries, None)  # an interrupt while writing leaves them unknown
        if written is None or written.coefficients != window.coefficients:
            factors.coefficients.write(np.asarray(window.coefficients, dtype=np.float32))
        if written is None or written.gate_steps != window.gate_steps:
            factors.gate_steps.write(np.asarray(window.gate_steps, dtype=np.int64))
        self._factors_written[window.entries] = window
        return factors

    def predict_held(self, block: int, slot: CacheSlot, factors: Factors, tokens: Buffer, tokens_out: Buffer) -> None:
        """Predict from the ring's first entry, by factors that are not the host's to write."""
        self.bound.run(
            (self._predict_part(block, 1), "held", block, tokens.address, factors.gate_steps.address),
            lambda: {
                "tokens": tokens,
                "history": slot.ring[0:1],
                "modulation": self.blocks.modulation[block],
                "gate_steps": factors.gate_steps,
                "coefficients": factors.coefficients,
                "tokens_out": tokens_out,
            },
        )

    def set_aside(self, block: int) -> None:
        """Copy a block's output to where one that is to be corrected stands."""
        self.blocks.fresh.copy_from(self.block_output(block))

    def blend(self, block: int, slot: CacheSlot, score: float, thresholds: tuple[float, float, float]) -> None:
        """Weigh the score, and mix estimate and fresh output, (1 − w)·estimate + w·fresh, into the block's output.

        The part can also compute the estimate from the ring, but by now the evaluation has replaced the ring's oldest
        entry: so the estimate was computed before it, and the ring takes part with a factor of 0.
        """
        blocks = self.blocks
        blocks.scores.write(np.full(blocks.scores.shape[0], score, dtype=np.float32))
        blocks.thresholds.write(np.asarray(thresholds, dtype=np.float32))
        self.blend_scored(block, slot, blocks.thresholds)

    def blend_scored(self, block: int, slot: CacheSlot, thresholds: Buffer) -> None:
        """Do the same where the scores stand in their buffer already, and the thresholds, (3,), in one of their own."""
        blocks = self.blocks
        self.bound.run(
            (blend_part_name(self._model, units=self._model.units[block], evaluations=1), block, thresholds.address),
            lambda: {
                "base": blocks.estimate,
                "fresh": blocks.fresh,
                "history": slot.ring[0:1],
                "modulation": blocks.modulation[block],
                "gate_steps": blocks.no_factors.gate_steps,
                "coefficients": blocks.no_factors.coefficients,
                "estimate": blocks.scores,
                "thresholds": thresholds,
                "tokens_out": self.block_output(block),
                "weight": blocks.weights,
            },
        )

    # --- Signals -------------------------------------------------------------------------------------------------

    def input_signals(self, block: int, slot: CacheSlot) -> Reading:
        """Compare the block's input with that of its last evaluation, (R, 9)."""
        return self.compare(("input", block), self.block_input(block), slot.kept_reference)

    def error_signals(self, block: int) -> Reading:
        """Compare the estimate with the block's fresh output, relative to the latter, (R, 9)."""
        use = "error", self.blocks.places[block + 1]
        return self.compare(use, self.blocks.estimate, self.block_output(block))

    def compare(self, use: tuple[str | int, ...], tokens: Buffer, reference: Buffer) -> Reading:
        """Compare tokens with a reference, (R, 9); `use` names the pair, always the same two buffers."""
        signals = self.blocks.signals
        self.bound.run((SIGNALS_PART, *use), lambda: {"tokens": tokens, "reference": reference, "signals": signals})
        return signals.read_later()

    def _predict_part(self, block: int, evaluations: int) -> str:
        return predict_part_name(self._model, units=self._model.units[block], evaluations=evaluations)


def allocate_workspace(
    backend: Backend,
    model: ModelSpec,
    sessions: Mapping[str, Session],
    size: RunSize,
    null_prompt: Prompts | None = None,
) -> Workspace:
    """Allocate everything that runs of one size need."""
    image = allocate_image_buffers(backend, model, size)
    outputs = sessions["condition"].spec.outputs if "condition" in sessions else ()
    context = [tensor for tensor in outputs if not tensor.name.startswith("modulation_")]
    blocks = allocate_block_buffers(backend, model, size, context)
    slots = allocate_slots(backend, model, size, blocks.zeros)
    return Workspace(model, sessions, image, blocks, slots, backend.fuse, backend.allocate, null_prompt)


def workspace_bytes(model: ModelSpec, size: RunSize) -> int:
    """Return about how much a workspace of this size takes, with all slots' references: what grows with the model."""
    number = model.precision.numpy.itemsize
    tokens = number * size.rows * model.latents.tokens_at(size.latents) * model.width
    kept = size.kept_parts(len(model.units))
    units = size.history * sum(model.units[part] for part in kept)
    units += sum({count for part, count in enumerate(model.units) if part not in kept}) + size.residuals
    references = len(size.spans) or len(model.units) if size.caches else 0
    modulations = MODULATIONS_PER_UNIT * sum(model.units) + 2
    table = number * size.steps * size.rows * modulations * model.width
    image = DType.FLOAT32.numpy.itemsize * size.batch * math.prod(model.latents.shape_at(size.latents))
    prompt = model.conditions.prompt  # and its context, about as wide as the model's tokens
    text = 0 if prompt is None else size.rows * prompt.tokens * (4 * prompt.width + number * model.width)
    return tokens * (units + references + 5) + table + text + image * (max(size.output_history, 1) + 11)
