"""A bundle, opened: samples images, one request at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.decisions import Controller
from adacorr_deploy.core.bundle import Bundle, open_bundle, verified_content
from adacorr_deploy.core.engine_build import Range
from adacorr_deploy.core.errors import BundleError, EngineError, RequestError
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.null_prompt import null_prompt_bytes, null_prompt_from_content
from adacorr_deploy.core.progress import Progress as CoreProgress
from adacorr_deploy.core.prompts import MAX_TOKENIZER_BYTES, TEXT_ENCODER_PART, TOKENIZER_FILE
from adacorr_deploy.core.specs import DECODE_PART
from adacorr_deploy.core.tokenizer import PromptTokenizer
from adacorr_deploy.engines import backend_by_name
from adacorr_deploy.engines.backend import Backend, Session
from adacorr_deploy.engines.bundle_sessions import check_backend, open_part
from adacorr_deploy.plugins.kernels import noise_spec
from adacorr_deploy.runtime.buffers import RunSize
from adacorr_deploy.runtime.conditions import Prompts, check_latent_size, check_prompts, prompts_from_null
from adacorr_deploy.runtime.decoder import Decoder
from adacorr_deploy.runtime.denoise import LatentsObserver, Progress
from adacorr_deploy.runtime.planned_run import planned_run
from adacorr_deploy.runtime.prompt_encoder import PromptEncoder
from adacorr_deploy.runtime.request import SampleRequest, check_latents
from adacorr_deploy.runtime.slots import CacheSlot
from adacorr_deploy.runtime.trace import Trace
from adacorr_deploy.runtime.workspace import Workspace, allocate_workspace

WORKSPACES_KEPT: Final = 2  # run sizes whose buffers stay allocated; a third takes the place of the longest unused
_LATER: Final = frozenset({DECODE_PART, TEXT_ENCODER_PART})  # parts that are opened when they are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """What a request came to."""

    latents: NDArray[np.float32]  # (B, C, H, W)
    trace: Trace
    launches: int  # of block engines, as the sessions count them
    rho: float  # share of block launches skipped, of those that the asked steps would take, 0 … 1
    seconds: float  # from the first input written to the latents read
    steps: int


class Pipeline:
    """The parts of a bundle as open sessions, and the buffers between them.

    Use it as a context manager, or call `close`. It serves one request at a time; a second thread that calls `sample`
    meanwhile gets an error at once.
    """

    def __init__(self, bundle: Bundle, backend: Backend, sessions: Mapping[str, Session], resources: ExitStack) -> None:
        self.bundle = bundle
        self.example_prompts: Prompts | None = None  # that measurements ask for; None: random ones
        self._backend = backend
        self._sessions = dict(sessions)
        self._decoder: Decoder | None = None
        self._prompt_encoder: PromptEncoder | None = None
        self._null_prompt = _null_prompt(bundle)
        build = bundle.manifest.engine_build
        self._limits = build.profile if build is not None and not backend.opens_onnx else None
        self._resources = resources
        self._workspaces: OrderedDict[RunSize, Workspace] = OrderedDict()
        self._busy = threading.Lock()
        self._holders: list[Callable[[], None]] = []
        self._closed = False

    @classmethod
    def open(cls, path: Path | str, *, backend: Backend | str | None = None) -> Pipeline:
        """Open a bundle.

        Args:
            path: The bundle's folder.
            backend: What runs its parts, or its name; by default the one that it was built for.

        Raises:
            BundleError: If the bundle is altered or incomplete.
            BackendUnavailableError: If the backend is not installed.
            EngineError: If a part can't be opened here.
        """
        bundle = open_bundle(Path(path))
        _check_parts(bundle)
        with ExitStack() as resources:
            if backend is None or isinstance(backend, str):
                backend = backend_by_name(backend or bundle.manifest.backend)
                resources.callback(backend.close)
            check_backend(bundle, backend)
            sessions = {}
            for name in (each for each in bundle.manifest.parts if each not in _LATER):
                sessions[name] = open_part(bundle, name, backend)
                resources.callback(sessions[name].close)
            if (noise := backend.open_noise(noise_spec(bundle.manifest.model))) is not None:
                sessions[noise.spec.name] = noise
                resources.callback(noise.close)
            return cls(bundle, backend, sessions, resources.pop_all())

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def backend(self) -> Backend:
        return self._backend

    @property
    def example_prompts_sha256(self) -> str | None:
        """Tells measurements of one file of prompts from those of another, or of random ones: None."""
        return self.example_prompts.sha256 if self.example_prompts is not None else None

    @property
    def compiled_axes(self) -> Mapping[str, Range] | None:
        """Smallest, tuned and largest size of every named axis; None where engines take any."""
        return self._limits.axes() if self._limits is not None else None

    def session(self, part: str) -> Session:
        """Return a part's open session, to run the part alone; it is closed with the pipeline.

        Raises:
            EngineError: If it was not open yet, and can't be opened here.
        """
        if part not in self._sessions:
            self._sessions[part] = open_part(self.bundle, part, self._backend)
            self._resources.callback(self._sessions[part].close)
        return self._sessions[part]

    def close(self) -> None:
        """Close the sessions and free the buffers once no request is running. A second call does nothing.

        A batching engine that holds the pipeline is closed first, as its own `close` does.
        """
        for give_up in (*self._holders,):
            give_up()
        with self._busy:
            self._closed = True
            self._workspaces.clear()
            self._decoder = self._prompt_encoder = None
            self._resources.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def sample(
        self,
        request: SampleRequest,
        controller: Controller,
        *,
        history: int,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_latents: LatentsObserver | None = None,
    ) -> SampleResult:
        """Denoise one batch.

        Args:
            request: What to sample.
            controller: Decides for this request; made anew for each.
            history: Evaluations that a slot keeps, T: what the controller's predictor needs, 1 … 3. With 0 nothing is
                cached, and slots take no memory.
            progress: Called after each step.
            cancelled: Asked before each block; True ends the request.
            on_latents: Given a host copy of the latents after each step; on a GPU, every step then waits for it.

        Raises:
            RequestError: If the request is out of range.
            SamplingCancelledError: If `cancelled` returned True.
            PolicyError: If the controller asks for what its slot can't give.
            EngineError: If an engine fails, the latents become NaN, or the pipeline is busy or closed.
        """
        run = planned_run(self.manifest, request, controller, history=history)
        with self.lease(run.size, references=run.references) as (space, slots):
            launches = self._block_launches()
            started = time.perf_counter()
            denoiser = run.start(space, slots, progress=progress, cancelled=cancelled, on_latents=on_latents)
            latents = denoiser.run()
            return SampleResult(
                latents=latents,
                trace=denoiser.trace,
                launches=self._block_launches() - launches,
                rho=denoiser.trace.rho,
                seconds=time.perf_counter() - started,
                steps=request.steps,
            )

    def decode(
        self,
        latents: NDArray[np.float32],
        *,
        progress: CoreProgress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> NDArray[np.float32]:
        """Return the images of latents, (B, 3, s·H, s·W) in [−1, 1]; the first call opens the decoder.

        Args:
            latents: Of one or more requests of one size, (B, C, H, W).
            progress: Told before each tile, and at the end.
            cancelled: Asked before each tile; True ends the decoding.

        Raises:
            RequestError: If the latents are not this model's, or the bundle holds no decoder.
            SamplingCancelledError: If `cancelled` returned True.
            EngineError: If an engine fails, an image is not finite, or the pipeline is busy or closed.
        """
        with self.exclusive():
            decoder = self.decoder()
            model, size = self.manifest.model, None
            if len(np.shape(latents)) == 1 + len(model.latent_shape) and model.latents.varying:
                size = tuple(np.shape(latents)[2:])
                check_latent_size(size, model.latents)
            check_latents(latents, (len(latents), *model.latents.shape_at(size)))
            return decoder.images(latents, progress=progress, cancelled=cancelled)

    def encode(
        self,
        prompts: Sequence[str],
        negative: Sequence[str] = (),
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Prompts:
        """Return the embeddings of prompts, one per image; the first call opens the text encoder.

        Args:
            prompts: Texts of any length; the model takes as many tokens of each as it was trained on.
            negative: One for all images or one for each, of the rows without condition; none: the bundle's null prompt.
            cancelled: Asked before each prompt; True ends the encoding.

        Raises:
            RequestError: If a prompt is no text, there are none, or the bundle holds no text encoder.
            BackendUnavailableError: If the package tokenizers is not installed.
            SamplingCancelledError: If `cancelled` returned True.
            EngineError: If an engine fails, an embedding is not finite, or the pipeline is busy or closed.
        """
        with self.exclusive():
            return self.prompt_encoder().encode(prompts, negative, cancelled=cancelled)

    def prompt_encoder(self) -> PromptEncoder:
        """Return what encodes prompts, for who holds the pipeline; the first call opens it.

        Raises:
            RequestError: If the bundle holds no text encoder.
            BackendUnavailableError: If the package tokenizers is not installed.
            BundleError: If its tokenizer is none.
            EngineError: If it can't be opened here.
        """
        spec, prompt = self.manifest.text_encoder, self.manifest.model.conditions.prompt
        if spec is None or prompt is None:
            raise RequestError(
                f"{self.bundle.path} holds no text encoder. Give embeddings in place of prompts, or rebuild it with: "
                "adacorr-build MODEL --text-encoder PATH"
            )
        if self._prompt_encoder is None:
            file = self.bundle.file(TOKENIZER_FILE)
            try:
                sha256 = self.manifest.files[TOKENIZER_FILE].sha256
                content = verified_content(file, sha256, limit_bytes=MAX_TOKENIZER_BYTES)
            except ValueError as error:
                raise BundleError(f"{file}: {error}. Rebuild the bundle with adacorr-build.") from error
            tokenizer = PromptTokenizer(content, spec, prompt, where=str(file))
            self._prompt_encoder = PromptEncoder(tokenizer, self.session(TEXT_ENCODER_PART), self._backend)
        return self._prompt_encoder

    def decoder(self) -> Decoder:
        """Return the decoder, for who holds the pipeline; the first call opens it.

        Raises:
            RequestError: If the bundle holds none.
            EngineError: If it can't be opened here.
        """
        spec = self.manifest.decoder
        if spec is None:
            raise RequestError(
                f"{self.bundle.path} holds no decoder. Keep latents, or rebuild it with: adacorr-build MODEL --vae PATH"
            )
        if self._decoder is None:
            self._decoder = Decoder(spec, self.session(DECODE_PART), self._backend)
        return self._decoder

    @contextmanager
    def lease(
        self, size: RunSize, *, references: Callable[[int], int]
    ) -> Iterator[tuple[Workspace, tuple[CacheSlot, ...]]]:
        """Lend the workspace of a run size and its cleared slots; `sample` does, and calibration drives them itself.

        Args:
            size: Of the run.
            references: Says of each span how many of its observations its slot keeps an earlier one of.

        Raises:
            RequestError: If the engines were not compiled for this batch or these steps.
            EngineError: If the pipeline is busy or closed.
        """
        self.check_size(size)
        with self.exclusive():
            space = self._workspace(size)
            with space.slots.lease(references=references if size.caches else _none) as slots:
                yield space, slots

    def check_size(self, size: RunSize) -> None:
        """Refuse a run that the engines were not compiled for.

        Raises:
            RequestError: If its batch, its steps or its latents' size are outside what they take.
        """
        if self._limits is not None:
            sizes = self.manifest.model.latents.sizes_at(size.latents)
            self._limits.check(batch=size.batch, steps=size.steps, sizes=sizes)

    def new_workspace(self, size: RunSize) -> Workspace:
        """Allocate a workspace of the caller's own; whoever runs it must hold the pipeline (`exclusive`)."""
        return allocate_workspace(self._backend, self.manifest.model, self._sessions, size, self._null_prompt)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the pipeline: meanwhile no one else samples with it, nor closes it.

        Raises:
            EngineError: If it is busy or closed.
        """
        if not self._busy.acquire(blocking=False):
            raise EngineError(
                "This pipeline is sampling another request. Wait until it has ended, or open a second pipeline."
            )
        try:
            if self._closed:
                raise EngineError("This pipeline was closed. Open the bundle again.")
            yield
        finally:
            self._busy.release()

    @contextmanager
    def called_before_close(self, give_up: Callable[[], None]) -> Iterator[None]:
        """Let whoever closes the pipeline call this first: it must end what holds the pipeline for long."""
        self._holders.append(give_up)
        try:
            yield
        finally:
            self._holders.remove(give_up)

    def _workspace(self, size: RunSize) -> Workspace:
        if size not in self._workspaces:
            while len(self._workspaces) >= WORKSPACES_KEPT:  # before the next allocation, so that they never add up
                self._workspaces.popitem(last=False)
            self._workspaces[size] = self.new_workspace(size)
        self._workspaces.move_to_end(size)
        return self._workspaces[size]

    def _block_launches(self) -> int:
        return sum(self._sessions[name].launches for name in self.manifest.model.block_names)


def _none(span: int) -> int:
    return 0


def _null_prompt(bundle: Bundle) -> Prompts | None:
    """Read the prompt of images without condition, where a bundle has one."""
    name, spec = bundle.manifest.null_prompt, bundle.manifest.model.conditions.prompt
    if name is None or spec is None:
        return None
    record = bundle.manifest.files[name]
    try:
        content = verified_content(bundle.file(name), record.sha256, limit_bytes=null_prompt_bytes(spec))
        prompts = prompts_from_null(null_prompt_from_content(content, spec))
        if prompts is not None:
            check_prompts(prompts, spec, name="null_prompt")
    except (ValueError, RequestError) as error:
        fault = str(error).rstrip(".")
        raise BundleError(f"{bundle.file(name)}: {fault}. Rebuild the bundle with adacorr-build.") from error
    return prompts


def _check_parts(bundle: Bundle) -> None:
    needed = ("embed", "condition", *bundle.manifest.model.block_names, "head")
    if missing := [name for name in needed if name not in bundle.manifest.parts]:
        raise BundleError(f"{bundle.path}: part {missing[0]} is missing. Rebuild the bundle with adacorr-build.")
