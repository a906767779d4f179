"""The buffers of a run, allocated once for its sizes and bound by address for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from adacorr_deploy.caching.decisions import Span, SpanCache, unit_spans
from adacorr_deploy.core.latents import LatentSize
from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, STEPS
from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT, DType, ModelSpec, TensorSpec, request_tensors
from adacorr_deploy.engines.backend import Backend, Buffer
from adacorr_deploy.plugins.service_parts import MAX_EVALUATIONS, SIGNAL_COUNT
from adacorr_deploy.runtime.layout import token_places
from adacorr_deploy.runtime.request import SampleRequest

MAX_HISTORY: Final = MAX_EVALUATIONS  # a slot keeps no more than the predict parts can use


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSize:
    """What buffers depend on: B, K, S, T of the blocks and of the output (0: nothing is cached), spans, and the size.

    `spans` is empty where each part is a span that keeps its units, or the whole step is one. `latents` is None where
    they have the model's default size.
    """

    batch: int
    branches: int
    steps: int
    history: int = 0
    output_history: int = 0
    spans: tuple[Span, ...] = ()
    latents: LatentSize | None = None

    @classmethod
    def of(
        cls, request: SampleRequest, *, history: int, whole_steps: bool, spans: tuple[Span, ...] = (), outputs: int = 0
    ) -> RunSize:
        """Return the size of a request.

        Args:
            request: What is sampled.
            history: Evaluations that its policy keeps, of blocks, spans or whole steps.
            whole_steps: Whether these are of whole steps, the model's outputs.
            spans: Where not each part is one that keeps its units.
            outputs: Outputs that are kept at least, for a revision.
        """
        return cls(
            batch=request.batch,
            branches=request.branches,
            steps=request.steps,
            history=0 if whole_steps else history,
            output_history=max(outputs, history if whole_steps else 0),
            spans=spans,
            latents=request.size,
        )

    def kept_parts(self, parts: int) -> frozenset[int]:
        """Return which of the block parts have a slot of their own, for their units."""
        if not self.history:
            return frozenset()
        units = [span.first for span in self.spans if span.cache is SpanCache.UNITS]
        return frozenset(units if self.spans else range(parts))

    @property
    def residuals(self) -> int:
        """Residuals that are kept, (R, N, D) each."""
        return self.history * sum(span.cache is SpanCache.RESIDUAL for span in self.spans)

    @property
    def rows(self) -> int:
        return self.batch * self.branches

    @property
    def caches(self) -> bool:
        return bool(self.history or self.output_history)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """How a prediction weighs its evaluations, (count,) each."""

    coefficients: Buffer  # float32
    gate_steps: Buffer  # int64


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBuffers:
    """What stands on the image's side of the blocks: inputs and outputs of embed, condition and head."""

    latents: tuple[Buffer, Buffer]  # (B, C, H, W) float32; step s reads [s % 2] and writes the other
    carried: tuple[Buffer, Buffer]  # (B, C, H, W) float32: a multistep sampler's, in turns as the latents
    noise: Buffer  # (B, C, H, W) float32
    noise_keys: Buffer  # (B, 2) int64: each image's generator
    noise_draw: Buffer  # (1,) int64: which of its draws
    kept: tuple[Buffer, Buffer]  # (B, C, H, W) float32: latents and carried that the first skipped step started from
    scratch: Buffer  # (B, C, H, W) float32: latents of a step that is only measured
    scratch_carried: Buffer  # (B, C, H, W) float32: what such a step would carry
    predicted_output: Buffer  # (B, C, H, W) float32
    output_error: Buffer  # (B,) float32
    output_factors: tuple[Buffer, ...]  # (T,) float32, for 1 … MAX_HISTORY evaluations
    branches: Buffer  # (K,) float32 ones
    guidance: Buffer  # (K, B) float32
    request: Mapping[str, Buffer]  # what the runtime knows of a request, as `core.specs.request_tensors`
    coefficients: Buffer  # (S, 8) float32
    step: Buffer  # (1,) int64: the present step, read by every block and the head


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBuffers:
    """What stands between the blocks, in the model's precision."""

    tokens: tuple[Buffer, ...]  # (R, N, D); a block reads one and writes another, as `places` says
    histories: tuple[Buffer, ...]  # (1, 1, R, N, D): the same memory, as a slot's ring
    places: tuple[int, ...]  # which of them stands at each boundary between block parts
    fresh: Buffer  # (R, N, D): output of a block that is to be corrected
    estimate: Buffer  # (R, N, D): a prediction that does not go to the next block
    zeros: Buffer  # (R, N, D), never written
    modulation: tuple[Buffer, ...]  # per block part (S, R, 3U, D)
    modulation_head: Buffer  # (S, R, 2, D)
    context: Mapping[str, Buffer]  # (R, …) each: what the condition part gives the blocks besides
    signals: Buffer  # (R, 9) float32
    factors: tuple[Factors, ...]  # for 1 … MAX_HISTORY evaluations
    no_factors: Factors  # one coefficient that is 0 for good
    scores: Buffer  # (R,) float32: what a correction weighs
    thresholds: Buffer  # (3,) float32: τ_reuse, τ_recompute, γ
    weights: Buffer  # (R,) float32: how much of the fresh output a correction took


def named_sizes(model: ModelSpec, size: RunSize) -> dict[str, int]:
    """Return the size of every named axis of a part in a run."""
    of_request = {BATCH: size.batch, BRANCHES: size.branches, ROWS: size.rows, STEPS: size.steps}
    return {**of_request, **model.latents.sizes_at(size.latents)}


def allocate_image_buffers(backend: Backend, model: ModelSpec, size: RunSize) -> ImageBuffers:
    """Allocate the buffers of embed, condition and head."""
    image = (size.batch, *model.latents.shape_at(size.latents))
    sizes = named_sizes(model, size)

    def pair() -> tuple[Buffer, Buffer]:
        return backend.allocate(image, DType.FLOAT32), backend.allocate(image, DType.FLOAT32)

    buffers = ImageBuffers(
        latents=pair(),
        carried=pair(),
        noise=backend.allocate(image, DType.FLOAT32),
        noise_keys=backend.allocate((size.batch, 2), DType.INT64),
        noise_draw=backend.allocate((1,), DType.INT64),
        kept=pair(),
        scratch=backend.allocate(image, DType.FLOAT32),
        scratch_carried=backend.allocate(image, DType.FLOAT32),
        predicted_output=backend.allocate(image, DType.FLOAT32),
        output_error=backend.allocate((size.batch,), DType.FLOAT32),
        output_factors=tuple(backend.allocate((count,), DType.FLOAT32) for count in range(1, MAX_HISTORY + 1)),
        branches=backend.allocate((size.branches,), DType.FLOAT32),
        guidance=backend.allocate((size.branches, size.batch), DType.FLOAT32),
        request={
            name: backend.allocate(tensor.resolved(sizes), tensor.dtype)
            for name, tensor in request_tensors(model).items()
        },
        coefficients=backend.allocate((size.steps, len(COLUMNS)), DType.FLOAT32),
        step=backend.allocate((1,), DType.INT64),
    )
    buffers.branches.write(np.ones(size.branches, dtype=np.float32))
    return buffers


def allocate_block_buffers(
    backend: Backend, model: ModelSpec, size: RunSize, context: Sequence[TensorSpec] = ()
) -> BlockBuffers:
    """Allocate the buffers between the blocks and of the service parts, and for the context that `condition` makes."""
    sizes = named_sizes(model, size)
    tokens = (size.rows, model.latents.tokens_at(size.latents), model.width)

    def table(rows: int) -> Buffer:
        return backend.allocate((size.steps, size.rows, rows, model.width), model.precision)

    def factors(count: int) -> Factors:
        return Factors(
            coefficients=backend.allocate((count,), DType.FLOAT32), gate_steps=backend.allocate((count,), DType.INT64)
        )

    places = token_places(size.spans or unit_spans(len(model.units)))
    histories = tuple(backend.allocate((1, 1, *tokens), model.precision) for _ in range(1 + max(places)))
    return BlockBuffers(
        tokens=tuple(history[0][0] for history in histories),
        histories=histories,
        places=places,
        fresh=backend.allocate(tokens, model.precision),
        estimate=backend.allocate(tokens, model.precision),
        zeros=backend.allocate(tokens, model.precision),
        modulation=tuple(table(MODULATIONS_PER_UNIT * units) for units in model.units),
        modulation_head=table(2),
        context={tensor.name: backend.allocate(tensor.resolved(sizes), tensor.dtype) for tensor in context},
        signals=backend.allocate((size.rows, SIGNAL_COUNT), DType.FLOAT32),
        factors=tuple(factors(count) for count in range(1, MAX_HISTORY + 1)),
        no_factors=factors(1),
        thresholds=backend.allocate((3,), DType.FLOAT32),
        scores=backend.allocate((size.rows,), DType.FLOAT32),
        weights=backend.allocate((size.rows,), DType.FLOAT32),
    )
