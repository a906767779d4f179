"""What a bundle is measured against: diffusers' own loop, and the runtime's chain over the original PyTorch modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import BundleError
from adacorr_deploy.core.prompts import TEXT_ENCODER_PART
from adacorr_deploy.core.schedules import Schedule
from adacorr_deploy.core.specs import DECODE_PART, DType
from adacorr_deploy.engines import Artefact
from adacorr_deploy.engines.torch_reference import TorchBackend
from adacorr_deploy.exporters.streamed_module import StreamedModule
from adacorr_deploy.quality.diffusers_schedulers import scheduler_for_run, step_options
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.conditions import condition_rows, prompts_from_null
from adacorr_deploy.runtime.request import NoiseStream, draws_of_steps, table_from_request

if TYPE_CHECKING:
    from adacorr_deploy.exporters import LoadedModel

Latents = NDArray[np.float32]  # (B, C, H, W)
Noises = Sequence[Latents | None]  # one per step; None where the sampler adds none


def reference_of_bundle(bundle: Bundle, loaded: LoadedModel) -> Pipeline:
    """Return what the bundle would be if its engines made no error, to be closed by the caller.

    It runs the original modules, in float32 whatever the bundle's precision. Of the bundle only its manifest is used.

    Raises:
        BundleError: If the bundle was built from another checkpoint or another model.
    """
    _check_same_model(bundle, loaded)
    segment, decoder = bundle.manifest.model.segment, bundle.manifest.decoder
    model = loaded.model.spec(DType.FLOAT32, segment)
    parts = {part.spec.name: part for part in loaded.parts(DType.FLOAT32, segment)}
    if decoder is not None and loaded.vae is not None:
        parts[DECODE_PART] = loaded.vae.part(model, decoder)
    if (prompt := model.conditions.prompt) is not None and loaded.text_encoder is not None:
        parts[TEXT_ENCODER_PART] = loaded.text_encoder.part(prompt)
    backend = TorchBackend({name: StreamedModule(part.module) for name, part in parts.items()})
    manifest = bundle.manifest.model_copy(update={"model": model, "backend": backend.name, "parts": {}})
    with ExitStack() as resources:
        sessions = {}
        for name, part in parts.items():
            sessions[name] = backend.open(Artefact(path=Path(name)), part.spec)
            resources.callback(sessions[name].close)
        return Pipeline(Bundle(path=bundle.path, manifest=manifest), backend, sessions, resources.pop_all())


def _check_same_model(bundle: Bundle, loaded: LoadedModel) -> None:
    manifest = bundle.manifest
    if manifest.checkpoint_sha256 != loaded.checkpoint_sha256:
        raise BundleError(
            f"{bundle.path} was built from {manifest.model_name} (checkpoint SHA-256 {manifest.checkpoint_sha256}), "
            f"and the reference is {loaded.name} (SHA-256 {loaded.checkpoint_sha256}). Give the checkpoint that "
            "the bundle was built from, or rebuild the bundle."
        )
    if manifest.model != loaded.model.spec(manifest.model.precision, manifest.model.segment):
        raise BundleError(
            f"{bundle.path} holds another model than the reference {loaded.name}, though their weights are equal. "
            "Give the configuration that the bundle was built with, or rebuild the bundle."
        )
    if manifest.decoder is not None and loaded.vae is not None and manifest.decoder.vae_sha256 != loaded.vae.sha256:
        raise BundleError(
            f"{bundle.path} decodes with another VAE (SHA-256 {manifest.decoder.vae_sha256}) than {loaded.vae.where} "
            f"(SHA-256 {loaded.vae.sha256}). Give its own with --vae."
        )
    encoder = manifest.text_encoder
    if encoder is not None and loaded.text_encoder is not None and encoder.sha256 != loaded.text_encoder.sha256:
        raise BundleError(
            f"{bundle.path} encodes prompts with another encoder (SHA-256 {encoder.sha256}) than "
            f"{loaded.text_encoder.where} (SHA-256 {loaded.text_encoder.sha256}). Give its own with --text-encoder."
        )


def initial_latents(pipeline: Pipeline, request: SampleRequest) -> Latents:
    """Return the latents that a request starts from."""
    return NoiseStream(request, request.latent_shape(pipeline.manifest.model)).at(0)


def uncached_latents(
    pipeline: Pipeline,
    request: SampleRequest,
    latents: Latents,
    noises: Noises,
    *,
    after_step: Callable[[], None] = lambda: None,
) -> Latents:
    """Run every block of every step with the noise given, and return the final latents, also if they are not finite."""
    table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    size = RunSize.of(request, history=0, whole_steps=False)
    with pipeline.lease(size, references=lambda block: 0) as (space, slots):
        space.prepare(request, table, latents)
        for step, noise in enumerate(noises):
            space.embed(step)
            for block, slot in enumerate(slots):
                space.evaluate(block, slot)
            space.head(step, noise)
            after_step()
        return space.read_latents(request.steps - 1)


def runtime_noises(pipeline: Pipeline, request: SampleRequest) -> Noises:
    """Return the noise that `Pipeline.sample` adds at each step of a request."""
    table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    stream = NoiseStream(request, request.latent_shape(pipeline.manifest.model))
    return [stream.at(draw) if draw is not None else None for draw in draws_of_steps(table)]


def diffusers_noises(pipeline: Pipeline, request: SampleRequest) -> Noises:
    """Return the noise that `diffusers_latents` adds at each step: its schedulers take a generator, not a tensor."""
    table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    generator = torch.Generator().manual_seed(request.seed)
    shape = (request.batch, *request.latent_shape(pipeline.manifest.model))
    return [torch.randn(shape, generator=generator).numpy() if noisy else None for noisy in table.noisy_steps]


def diffusers_latents(loaded: LoadedModel, schedule: Schedule, request: SampleRequest, latents: Latents) -> Latents:
    """Denoise with the original model, diffusers' scheduler and guidance as in its DiTPipeline; none of it is ours.

    One thing differs from that pipeline: a predicted variance is kept for the sampler that uses it.
    """
    model, null_prompt = loaded.model.spec(DType.FLOAT32, 1), loaded.model.null_prompt()
    scheduler = scheduler_for_run(schedule, request, tokens=model.latents.tokens_at(request.size))
    generator = torch.Generator().manual_seed(request.seed)
    rows_of = condition_rows(request, model, prompts_from_null(null_prompt))
    conditions = {name: torch.from_numpy(values) for name, values in rows_of.items()}
    keeps_variance = scheduler.config.get("variance_type") == "learned_range"
    sample = torch.from_numpy(latents)
    loaded.model.module.float()  # it may have been stored in less
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            rows = torch.cat([sample] * request.branches)
            output = loaded.model.predict(rows, timestep.expand(len(rows)), conditions)
            guided = _guided(output, sample.shape[1], request)
            guided = guided if keeps_variance else guided[:, : sample.shape[1]]
            sample = scheduler.step(guided, timestep, sample, generator=generator, **step_options(request)).prev_sample
    return np.asarray(sample.numpy(), dtype=np.float32)


def _guided(output: torch.Tensor, channels: int, request: SampleRequest) -> torch.Tensor:
    if request.branches == 1:
        return output
    noise, rest = output[:, :channels], output[:, channels:]
    conditional, unconditional = noise.chunk(2)
    guided = unconditional + request.guidance * (conditional - unconditional)
    return torch.cat([guided, rest[: request.batch]], dim=1)
