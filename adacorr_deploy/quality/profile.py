"""Profiles: one pass over uncached runs, from which every published policy's tables and fits are made.

Images are measured in small batches, one after another: memory holds the tokens of one batch's last few steps, whatever
the number of images, and an interrupted measurement loses at most one batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.profile import Profile, Quantity
from adacorr_deploy.core.errors import CalibrationError, EngineError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.samplers import Sampler, default_sampler
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.plugins import oracle
from adacorr_deploy.quality.array_files import Arrays
from adacorr_deploy.quality.calibrate import CALIBRATION_SEED
from adacorr_deploy.quality.memory_need import require_memory
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.profile_quantities import (
    COLLECTORS,
    Array,
    RunShape,
    Span,
    StepView,
    affine_maps,
    linear_gates,
    magnitude_ratios,
    output_change,
    part_errors,
    unit_errors,
)
from adacorr_deploy.runtime import Pipeline, SampleRequest, check_request
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.request import check_integer, draws_of_steps, table_from_request
from adacorr_deploy.runtime.sampling import calibration_key
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.workspace import Workspace, workspace_bytes

IMAGES_AT_ONCE: Final = 4
MIN_STEPS: Final = 4
VERSION: Final = 2  # of the measurement: partial results of another are not taken up
ALL_QUANTITIES: Final = frozenset(Quantity)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """For which runs to measure, and what.

    Attributes:
        spans: Spans of several block parts (first, stop) that need an affine map; single parts always get one.

    Raises:
        RequestError: If there are no images, or more than one request holds.
    """

    sampler: Sampler | None = None  # None: the model's own
    steps: int = 50
    guidance: float = 4.0
    images: int = 8
    quantities: frozenset[Quantity] = ALL_QUANTITIES
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        check_integer("images", self.images, 1, MAX_BATCH)


def profile(
    pipeline: Pipeline, options: ProfileOptions, progress: Progress | None = None, partials: Partials | None = None
) -> Profile:
    """Measure a bundle's uncached runs of one sampler, number of steps and guidance. Deterministic.

    Args:
        pipeline: An open bundle; every sampler will do.
        options: For which runs.
        progress: Told of every step.
        partials: Where finished batches of images are looked for and stored.

    Raises:
        CalibrationError: If there are fewer than 4 steps.
        RequestError: If an option is out of range, or this machine has not the memory for one batch of images.
        EngineError: If an engine fails or the tokens become NaN.
    """
    batches = check_options(pipeline, options)
    measured: list[Mapping[Quantity, Arrays]] = []
    for index, request in enumerate(batches):
        study = _BatchStudy(pipeline, request, options)
        found = study.stored(partials, index)
        if found is None:
            found = study.measure(progress or (lambda phase, done, total: None), index, len(batches))
            if partials is not None:
                for quantity, arrays in found.items():
                    partials.store(f"{index}-{quantity.value}", arrays)
        measured.append(found)
    return _profile(pipeline, options, batches[0], measured)


def check_options(pipeline: Pipeline, options: ProfileOptions) -> list[SampleRequest]:
    """Return the batches that a profile runs.

    Raises:
        CalibrationError: If there are fewer than 4 steps.
        RequestError: If an option is out of range, or this machine has not the memory for one batch of images.
    """
    model = pipeline.manifest.model
    batches = list(_requests(pipeline, options))
    for request in batches:
        check_request(request, model, pipeline.manifest.schedule)
    if options.steps < MIN_STEPS:
        raise CalibrationError(f"steps is {options.steps}; with fewer than {MIN_STEPS} there is nothing to reuse.")
    require_memory(
        needed_bytes(model, batches[0], options.quantities),
        what=f"Profiling {options.steps} steps on {batches[0].batch} images at once",
        lower="--images",
    )
    return batches


def _requests(pipeline: Pipeline, options: ProfileOptions) -> Iterator[SampleRequest]:
    """Yield the batches; labels go through the classes, and seeds are apart from those that people use."""
    model = pipeline.manifest.model
    for first in range(0, options.images, IMAGES_AT_ONCE):
        images = range(first, min(first + IMAGES_AT_ONCE, options.images))
        request = SampleRequest(
            labels=tuple(image * model.num_classes // options.images for image in images),
            steps=options.steps,
            guidance=options.guidance,
            seed=CALIBRATION_SEED + first,
            sampler=options.sampler or default_sampler(pipeline.manifest.schedule),
        )
        yield example_request(model, request, images, pipeline.example_prompts)


def spans_of(parts: int, options: ProfileOptions) -> tuple[Span, ...]:
    """Return the spans that get an affine map: every part, all parts, all but the first, and those asked for."""
    named = {(0, parts), (min(1, parts - 1), parts), *options.spans}
    return (*((part, part + 1) for part in range(parts)), *sorted(span for span in named if span[1] - span[0] > 1))


def needed_bytes(model: ModelSpec, request: SampleRequest, quantities: frozenset[Quantity]) -> int:
    """Return about how much profiling one batch keeps in memory: a workspace and the last steps' tokens, in float32."""
    size = RunSize.of(request, history=0, whole_steps=False)
    tokens = DType.FLOAT32.numpy.itemsize * size.rows * model.latents.tokens_at(size.latents) * model.width
    parts, units = len(model.units), sum(model.units)
    shape = RunShape(steps=1, parts=1, rows=1, width=1, spans=())
    reach = max((COLLECTORS[quantity](shape).reach for quantity in quantities), default=0)
    kept = parts + 2 + (units if Quantity.UNIT_ERRORS in quantities else 0)
    return workspace_bytes(model, size) + tokens * ((reach + 1) * kept + parts + 3)


class _BatchStudy:
    """The measurements of one batch of images."""

    def __init__(self, pipeline: Pipeline, request: SampleRequest, options: ProfileOptions) -> None:
        model = pipeline.manifest.model
        parts = len(model.units)
        shape = RunShape(
            steps=request.steps,
            parts=parts,
            rows=request.batch * request.branches,
            width=model.width,
            spans=spans_of(parts, options),
            kinds=_kinds(model),
        )
        self._pipeline = pipeline
        self._request = request
        self._collectors = {quantity: COLLECTORS[quantity](shape) for quantity in sorted(options.quantities)}
        asked = options.quantities
        self._modulated_parts = parts if Quantity.GATES in asked else int(Quantity.OUTPUT_CHANGE in asked)

    def stored(self, partials: Partials | None, index: int) -> dict[Quantity, Arrays] | None:
        """Return what an earlier run measured of this batch, if it measured all that is asked for now."""
        found: dict[Quantity, Arrays] = {}
        for quantity, collector in self._collectors.items():
            arrays = partials.load(f"{index}-{quantity.value}", collector.measured()) if partials is not None else None
            if arrays is None:
                return None
            found[quantity] = arrays
        return found

    def measure(self, progress: Progress, index: int, batches: int) -> dict[Quantity, Arrays]:
        """Run the batch without caching, and show every step to the collectors."""
        reach = max(collector.reach for collector in self._collectors.values())
        window: deque[StepView] = deque(maxlen=reach)  # the newest first
        steps = self._request.steps
        for view in self._views():
            progress("profiling", index * steps + view.step, batches * steps)
            for collector in self._collectors.values():
                collector.see(view, tuple(window))
            window.appendleft(replace(view, modulated=view.modulated[:1]))  # nobody compares the others' with before
        progress("profiling", (index + 1) * steps, batches * steps)
        return {quantity: collector.measured() for quantity, collector in self._collectors.items()}

    def _views(self) -> Iterator[StepView]:
        request, pipeline = self._request, self._pipeline
        table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
        size = RunSize.of(request, history=0, whole_steps=False)
        with pipeline.lease(size, references=lambda block: 0) as (space, slots):
            space.prepare(request, table, None)
            modulation = [_f32(buffer.read()) for buffer in space.blocks.modulation]
            for step, draw in enumerate(draws_of_steps(table)):
                space.embed(step)
                yield self._evaluated(step, space, slots, modulation)
                space.head(step, draw)

    def _evaluated(
        self, step: int, space: Workspace, slots: Sequence[CacheSlot], modulation: Sequence[Array]
    ) -> StepView:
        boundaries, units, modulated = [_f32(space.block_input(0).read())], [], []
        for part, slot in enumerate(slots):
            entry = slot.next_entry
            if part < self._modulated_parts:
                modulated.append(_f32(oracle.modulated(boundaries[part], modulation[part], np.asarray([step]))))
            space.evaluate(part, slot)
            boundaries.append(_f32(space.block_output(part).read()))
            if Quantity.UNIT_ERRORS in self._collectors:
                units.append(_f32(slot.ring[entry].read()))
        if not np.isfinite(boundaries[-1]).all():
            raise EngineError(
                f"The tokens hold NaN or infinite values at step {step + 1} of {self._request.steps}, without caching. "
                "Check the model with adacorr-validate; in fp16 build it with --precision fp32."
            )
        return StepView(step=step, boundaries=boundaries, units=units, modulated=modulated)


def _kinds(model: ModelSpec) -> tuple[str, ...]:
    return tuple(unit for block in model.blocks for unit in block)


def _profile(
    pipeline: Pipeline, options: ProfileOptions, request: SampleRequest, batches: Sequence[Mapping[Quantity, Arrays]]
) -> Profile:
    def rows(quantity: Quantity, name: str) -> NDArray[np.float64]:
        return np.concatenate([batch[quantity][name] for batch in batches], axis=-1)

    wanted, kinds = options.quantities, _kinds(pipeline.manifest.model)
    spans = spans_of(len(pipeline.manifest.model.units), options)
    return Profile(
        key=calibration_key(pipeline.bundle, request),
        images=options.images,
        output_change=output_change(rows(Quantity.OUTPUT_CHANGE, "pairs"))
        if Quantity.OUTPUT_CHANGE in wanted
        else None,
        magnitude_ratios=magnitude_ratios(rows(Quantity.MAGNITUDE_RATIOS, "ratios"))
        if Quantity.MAGNITUDE_RATIOS in wanted
        else None,
        unit_errors=unit_errors(rows(Quantity.UNIT_ERRORS, "errors"), kinds)
        if Quantity.UNIT_ERRORS in wanted
        else None,
        part_errors=part_errors(rows(Quantity.PART_ERRORS, "errors")) if Quantity.PART_ERRORS in wanted else None,
        affine=affine_maps(np.sum([batch[Quantity.AFFINE]["sums"] for batch in batches], axis=0), spans)
        if Quantity.AFFINE in wanted
        else None,
        gates=linear_gates(rows(Quantity.GATES, "means"), rows(Quantity.GATES, "errors"))
        if Quantity.GATES in wanted
        else None,
    )


def _f32(values: NDArray[np.generic]) -> Array:
    return np.asarray(values, dtype=np.float32)
