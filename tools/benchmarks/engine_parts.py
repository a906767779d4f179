"""What the arms of the engines' benchmark are made of: a model as ONNX files, and one backend's engines of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine_rows import COMPILING
from machine import say
from models import LoggedSession, Opened
from pydantic import TypeAdapter

from adacorr_deploy.core.bundle import Bundle, replace_file
from adacorr_deploy.core.engine_build import CompilerOptions, Profile, WeightLayout
from adacorr_deploy.core.errors import BackendUnavailableError
from adacorr_deploy.core.manifest import SCHEMA_VERSION, Manifest
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines import Artefact, Launch, backend_by_name
from adacorr_deploy.engines.bundle_sessions import check_precision
from adacorr_deploy.engines.gpu_backend import GpuBackend
from adacorr_deploy.exporters import LoadedModel, export_parts, monolithic_step_onnx
from adacorr_deploy.plugins.onnx_service_parts import service_parts
from adacorr_deploy.runtime import Pipeline

STEP_PART: Final = "step"
_ARTEFACT: Final = TypeAdapter(Artefact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A model's parts, and its one graph (STEP_PART), as ONNX files; `bundle` says of them what the runtime asks."""

    folder: Path
    specs: Mapping[str, PartSpec]
    bundle: Bundle

    @property
    def names(self) -> list[str]:
        """Of the parts that make a chain."""
        return [name for name in self.specs if name != STEP_PART]


def exported_parts(loaded: LoadedModel, precision: DType, folder: Path) -> Parts:
    """Export a model into a folder, unless an earlier process finished that.

    Raises:
        UnsupportedModelError: If a part can't be exported.
        OutputError: If a file can't be written.
    """
    model, finished = loaded.model.spec(precision, 1), folder / "exported"
    services = service_parts(model)
    specs = {part.spec.name: part.spec for part in loaded.parts(precision, 1)}
    specs |= {name: spec for name, (spec, _) in services.items()}
    specs[STEP_PART] = loaded.step_part(precision, 1).spec
    if not finished.exists():
        say("  exporting to ONNX")
        export_parts(loaded, folder, precision)
        monolithic_step_onnx(loaded, folder, precision)
        for name, (_, graph) in services.items():
            (folder / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        finished.touch()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model_name=loaded.name,
        model=model,
        checkpoint_sha256=loaded.checkpoint_sha256,
        schedule=loaded.schedule,
        backend="benchmark",
        parts={},
        files={},
        tool_versions={},
    )
    return Parts(folder=folder, specs=specs, bundle=Bundle(path=folder, manifest=manifest))


class EngineSet:
    """A backend's engines in one layout of weights: compiled and opened when they are first asked for."""

    def __init__(
        self, name: str, weights: str, parts: Parts, profile: tuple[int, int, int], closing: ExitStack
    ) -> None:
        """Load the backend, to compile for the batches of a profile; `closing` gives it up.

        Raises:
            BackendUnavailableError: If its packages or its hardware are not here.
            EngineError: If it doesn't run the parts' precision.
        """
        options = CompilerOptions(profile=Profile(batch=profile), weights=WeightLayout(weights))
        self.backend = backend_by_name(name, options if name in COMPILING else None)
        closing.callback(self.backend.close)
        check_precision(parts.bundle.manifest.model.precision, self.backend)
        if not self.backend.is_available():
            raise BackendUnavailableError(f"Backend {name} finds no GPU here. Check nvidia-smi.")
        self._parts = parts
        self._folder = parts.folder / f"{name}-{weights}"
        self._closing = closing
        self._sessions: dict[str, LoggedSession] = {}
        self._bound: list[tuple[str, Launch]] = []
        self._pipelines: dict[tuple[object, ...], Pipeline] = {}

    def opened(self, names: Iterable[str] | None = None) -> Opened:
        """Return open sessions, of the whole chain or of some parts, for as many pipelines as wanted.

        Raises:
            EngineError: If one can't be compiled, or opened here.
        """
        sessions = {name: self._session(name) for name in (self._parts.names if names is None else names)}
        return Opened(self._parts.bundle, self.backend, sessions, self._bound)

    def pipeline(self, *key: object) -> Pipeline:
        """Return a pipeline over the whole chain, the same for the same key: its buffers and launches are its own.

        Raises:
            EngineError: If a part can't be compiled, or opened here.
        """
        if key not in self._pipelines:
            self._pipelines[key] = self.opened().pipeline()
        return self._pipelines[key]

    def _session(self, name: str) -> LoggedSession:
        if name not in self._sessions:
            session = LoggedSession(self.backend.open(self._artefact(name), self._parts.specs[name]), self._bound)
            self._closing.callback(session.close)
            self._sessions[name] = session
        return self._sessions[name]

    def _artefact(self, name: str) -> Artefact:
        """Compile a part, unless an earlier process finished that."""
        note = self._folder / f"{name}.json"
        if note.exists():
            return _ARTEFACT.validate_json(note.read_bytes())
        if name in (STEP_PART, self._parts.names[0]):
            say(f"  {self._folder.name}: compiling {'the one graph' if name == STEP_PART else 'the parts'}")
        artefact = self.backend.build(self._parts.folder / f"{name}.onnx", self._parts.specs[name], self._folder)
        self._folder.mkdir(exist_ok=True)
        replace_file(note, _ARTEFACT.dump_json(artefact))
        return artefact

    # --- Graphs ------------------------------------------------------------------------------------------------------

    def use_graphs(self, on: bool) -> None:
        """Let launches become graphs from now on, or not."""
        if isinstance(self.backend, GpuBackend):
            self.backend.device.graphs = on

    @property
    def graph_launches(self) -> int:
        return self.backend.device.graph_launches if isinstance(self.backend, GpuBackend) else 0

    def fused(self, launches: list[Launch]) -> list[Launch]:
        """Return launches as one, where the device makes one of them."""
        one = self.backend.device.fuse(launches) if isinstance(self.backend, GpuBackend) else None
        return launches if one is None else [one]

    @property
    def capture_failure(self) -> str:
        """Why a launch is no graph, if one was to be."""
        failures = (getattr(launch, "capture_failure", None) for _, launch in self._bound)
        return next((failure for failure in failures if failure), "")
