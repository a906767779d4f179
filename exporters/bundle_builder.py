"""From a loaded checkpoint to a bundle: exported, compiled, hashed, and moved into place whole or not at all."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, policy_named
from adacorr_deploy.core.bundle import ENGINES_DIR, PARTS_DIR, Bundle, open_bundle, replace_file
from adacorr_deploy.core.errors import PolicyError, RequestError
from adacorr_deploy.core.manifest import (
    MANIFEST_NAME,
    MAX_TEXT,
    PRESET_PATTERN,
    SCHEMA_VERSION,
    Manifest,
    PartRecord,
    file_record,
)
from adacorr_deploy.core.null_prompt import NULL_PROMPT_FILE, content_of_null_prompt
from adacorr_deploy.core.output_folder import check_output_folder, output_folder
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.prompts import TOKENIZER_FILE
from adacorr_deploy.core.specs import MAX_DECODER_SIZE, DType, ModelSpec, PartSpec
from adacorr_deploy.engines.backend import Backend
from adacorr_deploy.engines.bundle_sessions import check_precision
from adacorr_deploy.exporters.checkpoints import LoadedModel
from adacorr_deploy.exporters.onnx_parts import export_part, export_parts
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.vae import DEFAULT_TILE, MIN_TILE
from adacorr_deploy.plugins.onnx_service_parts import service_parts

_TOOLS = ("adacorr-deploy", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a bundle is built.

    Attributes:
        precision: Of weights and of activations between parts.
        segment: Transformer blocks in a block part; caching decides over whole parts. `HALVES` makes a part of each
            unit of a transformer block (of a DiT's: attention and MLP), reused by itself.
        overwrite: Replace a bundle that stands at the output, once the new one is complete.
        default_policy: Preset, with or without a target or a correction on top, for runs that name none.
        vae_tile: Latent pixels, along a side, that the decoder takes at once; a larger image is decoded in tiles.
        vae_chunk: Frames of a clip that the decoder takes at once; None: see `LoadedVae.spec`.
        vae_precision: Of the decoder; None: see `LoadedVae.spec`.
        text_precision: Of the text encoder; None is float32.

    Raises:
        RequestError: If the tile or the chunk is no size.
        PolicyError: If the default policy is no preset (a file would not travel with the bundle).
    """

    precision: DType = DType.FLOAT32
    segment: int = 1
    overwrite: bool = False
    default_policy: str = DEFAULT_POLICY
    vae_tile: int = DEFAULT_TILE
    vae_chunk: int | None = None
    vae_precision: DType | None = None
    text_precision: DType | None = None

    def __post_init__(self) -> None:
        if not MIN_TILE <= self.vae_tile <= MAX_DECODER_SIZE:
            raise RequestError(f"vae_tile is {self.vae_tile}, allowed are {MIN_TILE} … {MAX_DECODER_SIZE}.")
        if self.vae_chunk is not None and not 1 <= self.vae_chunk <= MAX_DECODER_SIZE:
            raise RequestError(f"vae_chunk is {self.vae_chunk}, allowed are 1 … {MAX_DECODER_SIZE}.")
        preset, *_ = re.split(r"[@+]", self.default_policy)
        if preset not in PRESETS or not re.fullmatch(PRESET_PATTERN, self.default_policy):
            raise PolicyError(
                f"{self.default_policy!r} can't be a bundle's default policy. Known: {', '.join(PRESETS)}; "
                "give a policy file to adacorr-run instead."
            )
        policy_named(self.default_policy)


def build_bundle(
    loaded: LoadedModel,
    output: Path,
    backend: Backend,
    options: BuildOptions,
    *,
    progress: Progress | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Bundle:
    """Export, compile and store every part.

    The work is done in a folder beside `output` that is renamed when it is complete, and removed if anything fails or
    the build is interrupted (or by the next build, if this one is killed). Nothing of an earlier attempt is used.

    Args:
        loaded: The checkpoint.
        output: The bundle's folder; it must not exist unless `options.overwrite`.
        backend: Compiles the parts.
        options: See `BuildOptions`.
        progress: Told of each part as it is exported, and again as it is compiled.
        finish: Given the complete bundle before it is moved into place, to add to it (calibration) or to refuse it.

    Raises:
        OutputError: If `output` exists, or appears meanwhile, or can't be written.
        UnsupportedModelError: If a part can't be exported, or the VAE or the text encoder is not the model's.
        RequestError: If the engines are to be compiled for sizes that the model's latents can't have.
        EngineError: If the backend doesn't run this precision, or a part can't be compiled.
    """
    model = loaded.model.spec(options.precision, options.segment)
    beside: list[tuple[Part, DType]] = []  # what stands beside the model's own parts, and in which precision
    decoder = None
    if loaded.vae is not None:
        decoder = loaded.vae.spec(
            model, tile=options.vae_tile, chunk=options.vae_chunk, precision=options.vae_precision
        )
        beside.append((loaded.vae.part(model, decoder), decoder.precision))
    prompt, text_encoder = model.conditions.prompt, None
    if loaded.text_encoder is not None and prompt is not None:
        text_encoder = loaded.text_encoder.spec(prompt, options.text_precision)
        beside.append((loaded.text_encoder.part(prompt), text_encoder.precision))
    for precision in {options.precision, *(each for _, each in beside)}:
        check_precision(precision, backend)
    backend.for_model(model)
    with output_folder(output, overwrite=options.overwrite) as folder:
        parts_dir = folder / PARTS_DIR
        started = time.perf_counter()
        specs = export_parts(loaded, parts_dir, options.precision, options.segment, progress)
        specs |= _write_service_parts(model, parts_dir)
        specs |= {part.spec.name: export_part(part, precision, parts_dir) for part, precision in beside}
        if loaded.text_encoder is not None and text_encoder is not None:
            _write_file(folder / TOKENIZER_FILE, loaded.text_encoder.tokenizer.content)
        export_seconds = time.perf_counter() - started
        null_prompt = _write_null_prompt(loaded, folder)
        records = dict(_compiled_parts(specs, folder, backend, progress))
        files = {
            path.relative_to(folder).as_posix(): file_record(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            model_name=_shown(loaded.name),
            model=model,
            checkpoint_sha256=loaded.checkpoint_sha256,
            schedule=loaded.schedule,
            backend=backend.name,
            export_seconds=export_seconds,
            engine_build=backend.engine_build,
            parts=records,
            files=files,
            tool_versions=_tool_versions(),
            class_names=loaded.class_names,
            default_policy=options.default_policy,
            decoder=decoder,
            text_encoder=text_encoder,
            null_prompt=null_prompt,
        )
        replace_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())
        if finish is not None:
            finish(folder)
    return open_bundle(output)


def check_output(output: Path, options: BuildOptions) -> None:
    """Refuse an output that a build may not replace; worth calling before a large checkpoint is loaded.

    Raises:
        OutputError: If it exists and isn't a bundle to overwrite, is a link to nothing, or stands below a file.
    """
    check_output_folder(output, overwrite=options.overwrite)


def _shown(name: str) -> str:
    """Return a checkpoint's name, which may be any file name, as a manifest takes it."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:MAX_TEXT]


def _write_null_prompt(loaded: LoadedModel, folder: Path) -> str | None:
    """Store the prompt of images without condition: the checkpoint's, else that of an empty text; return where."""
    null_prompt, prompt = loaded.model.null_prompt(), loaded.model.spec(DType.FLOAT32, 1).conditions.prompt
    if null_prompt is None and loaded.text_encoder is not None and prompt is not None:
        null_prompt = loaded.text_encoder.null_prompt(prompt)
    if null_prompt is None:
        return None
    _write_file(folder / NULL_PROMPT_FILE, content_of_null_prompt(*null_prompt))
    return NULL_PROMPT_FILE


def _write_file(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)


def _write_service_parts(model: ModelSpec, parts_dir: Path) -> Mapping[str, PartSpec]:
    specs = {}
    for name, (spec, graph) in service_parts(model).items():
        (parts_dir / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        onnx.checker.check_model(parts_dir / f"{name}.onnx")
        specs[name] = spec
    return specs


def _compiled_parts(
    specs: Mapping[str, PartSpec], folder: Path, backend: Backend, progress: Progress | None
) -> Iterator[tuple[str, PartRecord]]:
    artefacts = folder / ENGINES_DIR / backend.name
    for done, (name, spec) in enumerate(specs.items()):
        if progress is not None:
            progress(name, done, len(specs))
        source = folder / PARTS_DIR / f"{name}.onnx"
        started = time.perf_counter()
        artefact = backend.build(source, spec, artefacts)
        yield (
            name,
            PartRecord(
                spec=spec,
                onnx=source.relative_to(folder).as_posix(),
                artefact=artefact.path.relative_to(folder).as_posix(),
                weights=artefact.weights.relative_to(folder).as_posix() if artefact.weights is not None else None,
                build_seconds=time.perf_counter() - started,
            ),
        )
    if progress is not None:
        progress("", len(specs), len(specs))


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
