"""A request that was checked and sized: what is left is a workspace to run it in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from adacorr_deploy.caching.decisions import Controller, keeps_output
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.samplers import SamplerTable, quiet_samplers
from adacorr_deploy.core.schedules import Schedule
from adacorr_deploy.core.specs import ModelSpec
from adacorr_deploy.runtime.buffers import MAX_HISTORY, RunSize
from adacorr_deploy.runtime.conditions import check_negative
from adacorr_deploy.runtime.denoise import Denoiser, LatentsObserver, Progress
from adacorr_deploy.runtime.layout import check_spans, own_layout
from adacorr_deploy.runtime.request import SampleRequest, check_request, draws_of_steps, table_from_request
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.trace import Branch, Trace
from adacorr_deploy.runtime.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One request, its controller, and what both ask of a workspace. It runs once: a controller serves one request."""

    model: ModelSpec
    request: SampleRequest
    table: SamplerTable
    controller: Controller
    size: RunSize

    def references(self, span: int) -> int:
        """Return how many of a span's observations its slot keeps an earlier one of; a probe is compared with none."""
        if not self.size.caches or span >= len(self.controller.spans):
            return 0
        return sum(each.compared for each in self.controller.observations(span))

    def start(
        self,
        space: Workspace,
        slots: Sequence[CacheSlot],
        *,
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
        on_latents: LatentsObserver | None = None,
    ) -> Denoiser:
        """Write the inputs into a workspace of `size` and compute the modulation of all steps; return the loop."""
        space.prepare(self.request, self.table, self.request.latents)
        space.spans.begin(self.controller)
        return Denoiser(
            space=space,
            slots=slots,
            controller=self.controller,
            trace=Trace(self.request.steps, self.model.block_names, tuple(Branch)[: self.request.branches]),
            batch=self.request.batch,
            draws=draws_of_steps(self.table),
            progress=progress,
            cancelled=cancelled,
            on_latents=on_latents,
        )


def planned_run(manifest: Manifest, request: SampleRequest, controller: Controller, *, history: int) -> PlannedRun:
    """Check that a request can be run with a controller whose slots keep `history` evaluations, and size it.

    Raises:
        RequestError: If the request is out of range.
        PolicyError: If the controller can't serve the request.
    """
    model = manifest.model
    check_request(request, model, manifest.schedule)
    check_negative(request, has_null_prompt=manifest.null_prompt is not None)
    if not 0 <= history <= MAX_HISTORY:
        raise PolicyError(f"history is {history}, allowed are 0 … {MAX_HISTORY} evaluations.")
    table = table_from_request(request, model, manifest.schedule)
    check_spans(controller.spans, len(model.units))
    whole = keeps_output(controller.spans)
    if whole and table.needs_variance:
        raise PolicyError(
            f"sampler {request.sampler.value} takes its noise from the model's variance, which a policy over whole "
            "steps does not predict. Choose a policy with a block predictor, or --sampler ddim."
        )
    check_revision(controller.revision, request, manifest.schedule)
    spans = own_layout(controller.spans, len(model.units))
    size = RunSize.of(request, history=history, whole_steps=whole, spans=spans, outputs=controller.revision.evaluations)
    if model.latents.shape_at(size.latents) == model.latent_shape:  # asked for, or not: the same buffers
        size = replace(size, latents=None)
    return PlannedRun(model=model, request=request, table=table, controller=controller, size=size)


def check_revision(revision: Revision, request: SampleRequest, schedule: Schedule) -> None:
    """Refuse a policy that takes steps again with a sampler that adds noise: it would have to be drawn again.

    Raises:
        PolicyError: If both are so.
    """
    if revision is not Revision.NONE and request.sampler.adds_noise(request.eta):
        raise PolicyError(
            f"sampler {request.sampler_label} adds noise, and the policy takes skipped steps again "
            f"(predictor.revision {revision.value}). Choose a policy without revision, or a sampler that adds none: "
            f"{' or '.join(quiet_samplers(schedule))}."
        )
