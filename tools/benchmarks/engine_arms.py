"""The arms of the engines' benchmark, opened: each runs whole requests, from the inputs written to the latents read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from engine_jobs import Job
from engine_parts import STEP_PART, EngineSet, exported_parts
from engine_rows import BLOCKS, COMPILED, DEVICE, MONOLITH, PRECISIONS, PYTORCH, Arm, evaluated_steps
from models import GUIDANCE, HISTORY, loaded_model, monolith_buffers, prepare, static_controller
from numpy.typing import NDArray
from torch import nn

from adacorr_deploy.caching.block_rules import block_rules
from adacorr_deploy.caching.controllers import PaperController, Run
from adacorr_deploy.caching.decisions import unit_spans
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PaperGate, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import BackendUnavailableError
from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.samplers import sampler_table
from adacorr_deploy.engines import Launch
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.plugins.service_parts import SIGNALS_PART, blend_part_name
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.device_decisions import sample_decided_on_device
from adacorr_deploy.runtime.planned_run import planned_run
from adacorr_deploy.runtime.request import NoiseStream
from adacorr_deploy.runtime.workspace import Workspace

_BEYOND_SCORES: Final = 1e9  # a floor that leaves nothing of a score, so that a guard alone decides
_HALF: Final = (0.5, (0.0, 1.0, 1.0))  # a score between its thresholds: the blend reads the cached and the fresh output


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a request came to; everything on the GPU has finished."""

    latents: NDArray[np.float32] | None = None  # (B, C, H, W)
    rho: float = 0.0


Runner = Callable[[], Outcome]


class Bench:
    """Opens the arms of one job, and compares what they compute with PyTorch in float32."""

    def __init__(self, job: Job, closing: ExitStack) -> None:
        """Make the model and its ONNX files, and sample the reference; `closing` gives everything up."""
        self._job = job
        self._closing = closing
        self._loaded = loaded_model(job.case.size)
        self._parts = exported_parts(self._loaded, PRECISIONS[job.case.precision], job.folder)
        self._model = self._parts.bundle.manifest.model
        labels = tuple(index % self._model.num_classes for index in range(job.case.batch))
        self._request = SampleRequest(labels, steps=job.case.steps, guidance=GUIDANCE)
        self._module: DiTTransformer2DModel | None = None
        self._sets: dict[tuple[str, str], EngineSet] = {}
        self._reference = self._sampled_reference()

    @property
    def blocks(self) -> int:
        return len(self._model.units)

    def runner(self, arm: Arm) -> Runner:
        """Return what runs an arm.

        Raises:
            EngineError: If its engines can't be compiled, or opened here.
        """
        if arm.backend == PYTORCH:
            return self._torch_runner(compiled=arm.engine == COMPILED)
        engines = self._engines(arm)
        if arm.engine == MONOLITH:
            return MonolithRunner(engines, self._request, arm)
        if arm.decided_by:
            return DecidedRunner(engines, self._request, arm)
        if arm.engine == BLOCKS:
            return BlocksRunner(engines, self._request, arm)
        return ServicesRunner(engines, self._request)

    def graph_launches(self, arm: Arm) -> int:
        """Return how many graphs were launched so far, by whatever shares the arm's device."""
        return 0 if arm.backend == PYTORCH else self._engines(arm).graph_launches

    def remark(self, arm: Arm) -> str:
        """Return why launches that should be graphs are none."""
        return self._engines(arm).capture_failure if arm.graphs else ""

    def error(self, outcome: Outcome) -> float | None:
        """Return ‖latents − reference‖ ÷ ‖reference‖, or None if there is nothing to compare."""
        if outcome.latents is None or self._reference is None:
            return None
        reference = self._reference.astype(np.float64)
        return float(np.linalg.norm(outcome.latents - reference) / np.linalg.norm(reference))

    def works(self) -> bool:
        """Whether the GPU still takes work: some failures leave a process without it."""
        try:
            for engines in self._sets.values():
                engines.backend.synchronize()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception:  # noqa: BLE001 - of whatever kind, the answer is no
            return False
        return True

    def _engines(self, arm: Arm) -> EngineSet:
        key = arm.backend, arm.weights
        if key not in self._sets:
            self._sets[key] = EngineSet(*key, self._parts, self._job.case.profile, self._closing)
        return self._sets[key]

    # --- PyTorch -----------------------------------------------------------------------------------------------------

    def _sampled_reference(self) -> NDArray[np.float32] | None:
        """Sample in float32; None where PyTorch has no GPU and the engines have."""
        if self._job.device == "cuda" and not torch.cuda.is_available():
            return None
        torch.backends.cudnn.allow_tf32 = False  # of the one convolution; matrix products have it off by default
        module = torch_module(self._loaded, torch.float32, self._job.device)
        latents = TorchRunner(module, module, self._loaded, self._request)().latents
        del module
        if self._job.device == "cuda":
            torch.cuda.empty_cache()
        return latents

    def _torch_runner(self, *, compiled: bool) -> Runner:
        if self._job.device == "cuda" and not torch.cuda.is_available():
            raise BackendUnavailableError(f"PyTorch {torch.__version__} can't use the GPU. Install a build for CUDA.")
        if self._module is None:
            dtype: torch.dtype = getattr(torch, self._model.precision.value)
            self._module = torch_module(self._loaded, dtype, self._job.device)
        call = self._module
        if compiled:
            call = torch.compile(call, mode="max-autotune", fullgraph=True, dynamic=False)
        return TorchRunner(self._module, call, self._loaded, self._request)


def torch_module(loaded: LoadedModel, dtype: torch.dtype, device: str) -> DiTTransformer2DModel:
    """Return a copy whose blocks share one embedder, as the original's do: torch.compile then computes it once."""
    module: DiTTransformer2DModel = copy.deepcopy(loaded.model.module)
    for block in module.transformer_blocks:
        block.norm1.emb = module.transformer_blocks[0].norm1.emb
    moved: DiTTransformer2DModel = nn.Module.to(module, device, dtype)  # its own `to` warns of a list that is empty
    return moved


class TorchRunner:
    """Guided DDIM in PyTorch over diffusers' model, with everything on its device."""

    def __init__(
        self,
        module: DiTTransformer2DModel,
        call: Callable[..., tuple[torch.Tensor]],
        loaded: LoadedModel,
        request: SampleRequest,
    ) -> None:
        self._call = call
        self._request = request
        self._dtype, device = module.dtype, module.device
        model = loaded.model.spec(PRECISIONS["fp32"], 1)
        table = sampler_table(loaded.schedule, request.sampler, request.steps)
        rows = request.batch * request.branches
        # One tensor each: a slice's address is not aligned as compiled code is promised.
        self._timesteps = [torch.full((rows,), float(time), device=device) for time in table.timesteps]
        columns = COLUMNS.index("latents"), COLUMNS.index("output")
        self._factors = table.coefficients[:, columns].tolist()
        self._labels = torch.from_numpy(request.rows(model.num_classes)).to(device)
        self._start = torch.from_numpy(NoiseStream(request, request.latent_shape(model)).at(0))

    @torch.inference_mode()
    def __call__(self) -> Outcome:
        latents = self._start.to(self._labels.device)
        for timestep, (of_latents, of_output) in zip(self._timesteps, self._factors, strict=True):
            rows = latents.to(self._dtype).repeat(self._request.branches, 1, 1, 1)
            (output,) = self._call(rows, timestep=timestep, class_labels=self._labels, return_dict=False)
            conditional, unconditional = output.float().chunk(2)
            guided = unconditional + self._request.guidance * (conditional - unconditional)
            latents = of_latents * latents + of_output * guided
        return Outcome(latents=latents.cpu().numpy())


# --- Engines ---------------------------------------------------------------------------------------------------------


class BlocksRunner:
    """The chain of parts in the product's own loop, under a static schedule."""

    def __init__(self, engines: EngineSet, request: SampleRequest, arm: Arm) -> None:
        self._engines = engines
        self._request = request
        self._arm = arm
        self._pipeline = engines.pipeline(arm.graphs, arm.reuse)

    def __call__(self) -> Outcome:
        self._engines.use_graphs(self._arm.graphs)
        steps, reuses = self._request.steps, self._arm.rho > 0
        evaluated = evaluated_steps(steps, self._arm.rho, first=HISTORY)
        run = Run(steps=steps, blocks=len(self._pipeline.manifest.model.units))
        controller = static_controller(PredictorKind(self._arm.reuse), run, evaluated)
        result = self._pipeline.sample(self._request, controller, history=HISTORY if reuses else 0)
        return Outcome(latents=result.latents, rho=result.rho)


class DecidedRunner:
    """The chain of parts, each block decided by its own signals: once reused, once evaluated, whatever they are.

    The host reads them and chooses what it launches, or the device does within a graph for each step.
    """

    def __init__(self, engines: EngineSet, request: SampleRequest, arm: Arm) -> None:
        self._engines = engines
        self._request = request
        self._on_device = arm.decided_by == DEVICE
        self._pipeline = engines.pipeline(arm.decided_by)
        self._policy = Policy(
            name=str(arm)[:80],
            gate=PaperGate(lazy=True),
            predictor=Predictor(kind=PredictorKind(arm.reuse)),
            guards=Guards(warmup_steps=0, final_steps=0, max_age_steps=1),
        )

    def __call__(self) -> Outcome:
        self._engines.use_graphs(True)
        blocks = len(self._pipeline.manifest.model.units)
        run, floors = Run(steps=self._request.steps, blocks=blocks), [_BEYOND_SCORES] * blocks
        controller = PaperController(self._policy, PaperGate(lazy=True), run, unit_spans(blocks), floors)
        if not self._on_device:
            result = self._pipeline.sample(self._request, controller, history=1)
        else:
            plan = planned_run(self._pipeline.manifest, self._request, controller, history=1)
            rules = block_rules(self._policy, floors, blocks)
            result = sample_decided_on_device(self._pipeline, plan, rules, fresh_gates=False)
        return Outcome(latents=result.latents, rho=result.rho)


class MonolithRunner:
    """One graph per step, in the chain's buffers; the modulations are made by the condition part, as for the chain."""

    def __init__(self, engines: EngineSet, request: SampleRequest, arm: Arm) -> None:
        self._engines = engines
        self._request = request
        self._graphs = arm.graphs
        opened = engines.opened(("condition", STEP_PART))
        self._pipeline = opened.pipeline()
        self._step = opened.sessions[STEP_PART]
        self._launches: tuple[Launch, ...] = ()  # of even and odd steps, whose latents change places

    def __call__(self) -> Outcome:
        self._engines.use_graphs(self._graphs)
        size = RunSize.of(self._request, history=0, whole_steps=False)
        with self._pipeline.lease(size, references=lambda block: 0) as (space, _):
            prepare(self._pipeline, space, self._request)
            if not self._launches:
                self._launches = self._bound(space)
            for step in range(self._request.steps):
                space.image.step.write(np.asarray([step], dtype=np.int64))
                self._launches[step % 2].run()
            return Outcome(latents=space.read_latents(self._request.steps - 1))

    def _bound(self, space: Workspace) -> tuple[Launch, ...]:
        ways = (space.image.latents, space.image.latents[::-1])
        return tuple(self._step.bind(monolith_buffers(self._step.spec, space, *way)) for way in ways)


class ServicesRunner:
    """The signals and the blend of every block, once a step: as one graph, where the device makes one of them."""

    def __init__(self, engines: EngineSet, request: SampleRequest) -> None:
        """Let the runtime bind each launch and run it once, over slots that keep one evaluation."""
        self._backend = engines.backend
        self._steps = request.steps
        engines.use_graphs(True)
        opened = engines.opened()
        self._pipeline, before = opened.pipeline(), len(opened.bound)
        size = RunSize.of(request, history=1, whole_steps=False)
        with self._pipeline.lease(size, references=lambda block: 1) as (space, slots):
            prepare(self._pipeline, space, request)
            space.embed(0)
            for block, slot in enumerate(slots):
                space.input_signals(block, slot)()
                space.blend(block, slot, *_HALF)
        wanted = SIGNALS_PART, blend_part_name(self._pipeline.manifest.model, units=2, evaluations=1)
        self._launches = engines.fused([launch for name, launch in opened.bound[before:] if name in wanted])

    def __call__(self) -> Outcome:
        for _ in range(self._steps):
            for launch in self._launches:
                launch.run()
        self._backend.synchronize()
        return Outcome()
