"""What the benchmarks of whole models share: random models, open sessions, static schedules, one graph's buffers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from sizes import SHAPES, shape_and_patch

import adacorr_deploy
from adacorr_deploy.caching.controllers import Run, StaticController
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import Policy, ScheduleGate
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.core.specs import PartSpec
from adacorr_deploy.engines import Backend, Buffer, Launch, Session
from adacorr_deploy.engines.bundle_sessions import open_part
from adacorr_deploy.exporters import LoadedModel, load_checkpoint
from adacorr_deploy.exporters.dit_adapter import DiTModel
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.request import NoiseStream, table_from_request
from adacorr_deploy.runtime.workspace import Workspace

GUIDANCE: Final = 4.0
HISTORY: Final = 2  # evaluations that a first-order extrapolation needs
PAUSE_SECONDS: Final = 0.02  # before each timing: PyTorch's threads spin for some milliseconds after their work


# --- The model -------------------------------------------------------------------------------------------------------


def loaded_model(size: str) -> LoadedModel:
    """Return the demo, or a random model of a size.

    Raises:
        AdaCorrError: If the size is not known.
    """
    if size == "demo":
        return load_checkpoint(Path(adacorr_deploy.__file__).parent / "demo")
    shape, patch = shape_and_patch(size)
    return loaded_dit(f"random-DiT-{size.replace('/', '-')}", random_dit(*shape, patch=patch))


def loaded_dit(name: str, dit: DiTTransformer2DModel) -> LoadedModel:
    """Return a model as a checkpoint that was loaded."""
    model = DiTModel(dit)
    return LoadedModel(
        name=name,
        model=model,
        schedule=model.training_schedule(),
        checkpoint_sha256="0" * 64,
        class_names=None,
    )


def random_dit(
    width: int, blocks: int, heads: int, side: int, *, patch: int, channels: int = 4
) -> DiTTransformer2DModel:
    """Return a DiT without learned variance whose blocks all do something, and embed alike as in released weights."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=blocks,
        sample_size=side,
        patch_size=patch,
    )
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        torch.nn.init.normal_(block.norm1.linear.weight, std=0.02)  # shifts, scales and gates, which start as zero
    return model.eval().requires_grad_(False)


def random_pixart(width: int, blocks: int, heads: int, side: int, *, caption: int) -> PixArtTransformer2DModel:
    """Return a PixArt whose prompts are so wide; diffusers draws its tables at random, so all blocks do something."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        cross_attention_dim=width,
        num_layers=blocks,
        sample_size=side,
        caption_channels=caption,
        use_additional_conditions=False,
    )
    return model.eval().requires_grad_(False)


def write_random_pipeline(name: str, folder: Path) -> Path:
    """Write a random model, say `DiT-XL/2` or `PixArt-XL`, as diffusers writes pipelines, and return the folder.

    Raises:
        AdaCorrError: If the name is of no known size.
    """
    family, _, size = name.partition("-")
    (width, blocks, heads, side), patch = shape_and_patch(size)
    scheduler: DDIMScheduler | DPMSolverMultistepScheduler
    if family == "DiT":
        model: DiTTransformer2DModel | PixArtTransformer2DModel = random_dit(width, blocks, heads, side, patch=patch)
        pipeline = "DiTPipeline"
        scheduler = DDIMScheduler(clip_sample=False)
    elif family == "PixArt":
        model, pipeline = random_pixart(width, blocks, heads, 2 * side, caption=4096), "PixArtAlphaPipeline"
        scheduler = DPMSolverMultistepScheduler()
    else:
        raise AdaCorrError(
            f"{name!r} is no random model. Allowed are DiT-… and PixArt-… of these sizes: {', '.join(SHAPES)}."
        )
    model.save_pretrained(folder / "transformer", max_shard_size="100GB")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": pipeline,
        "transformer": ["diffusers", type(model).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


# --- Sessions that pipelines share -----------------------------------------------------------------------------------


class LoggedSession:
    """A session that remembers the launches bound from it; running them costs nothing more."""

    def __init__(self, session: Session, bound: list[tuple[str, Launch]]) -> None:
        self._session = session
        self._bound = bound

    @property
    def spec(self) -> PartSpec:
        return self._session.spec

    @property
    def launches(self) -> int:
        return self._session.launches

    def bind(self, buffers: Mapping[str, Buffer]) -> Launch:
        launch = self._session.bind(buffers)
        self._bound.append((self.spec.name, launch))
        return launch

    def close(self) -> None:
        self._session.close()


@dataclass(frozen=True, slots=True)
class Opened:
    """A bundle whose sessions serve several pipelines: one pipeline keeps the buffers of two run sizes only."""

    bundle: Bundle
    backend: Backend
    sessions: Mapping[str, LoggedSession]
    bound: list[tuple[str, Launch]]

    @classmethod
    def of(cls, bundle: Bundle, backend: Backend, resources: ExitStack) -> Opened:
        """Open every part; `resources` closes them."""
        bound: list[tuple[str, Launch]] = []
        sessions = {}
        for name in bundle.manifest.parts:
            sessions[name] = LoggedSession(open_part(bundle, name, backend), bound)
            resources.callback(sessions[name].close)
        return cls(bundle, backend, sessions, bound)

    def pipeline(self) -> Pipeline:
        return Pipeline(self.bundle, self.backend, self.sessions, ExitStack())


# --- Running it ------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    time.sleep(PAUSE_SECONDS)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def prepare(pipeline: Pipeline, space: Workspace, request: SampleRequest) -> None:
    """Put the request's inputs and modulations in place."""
    table = table_from_request(request, pipeline.manifest.model, pipeline.manifest.schedule)
    space.prepare(request, table, NoiseStream(request, request.latent_shape(pipeline.manifest.model)).at(0))


def monolith_buffers(spec: PartSpec, space: Workspace, latents: Buffer, latents_out: Buffer) -> dict[str, Buffer]:
    """Return what the one graph of a whole step is bound to, in a workspace of the chain."""
    image, blocks = space.image, space.blocks
    buffers = {
        "latents": latents,
        "branches": image.branches,
        "step": image.step,
        "guidance": image.guidance,
        "coefficients": image.coefficients,
        "noise": image.noise,
        "carried": image.carried[0],
        "carried_out": image.scratch_carried,
        "modulation_head": blocks.modulation_head,
        "latents_out": latents_out,
        "model_output": image.predicted_output,
        **{f"modulation_{index:02d}": buffer for index, buffer in enumerate(blocks.modulation)},
    }
    return {tensor.name: buffers[tensor.name] for tensor in (*spec.inputs, *spec.outputs)}


def static_controller(kind: PredictorKind, run: Run, evaluated: frozenset[int]) -> StaticController:
    """Return what evaluates these steps and predicts the others to first order, whatever is measured.

    Outputs are revised as the presets over whole steps do.
    """
    revision = Revision.QUADRATIC if kind is PredictorKind.OUTPUT_TAYLOR else Revision.NONE
    policy = Policy(
        name=f"static {kind.value}",
        gate=ScheduleGate(),
        predictor=Predictor(kind=kind, order=HISTORY - 1, revision=revision),
        guards=Guards(final_steps=0, max_age_steps=1000),
    )
    return StaticController(policy, run, evaluated, "benchmark")
