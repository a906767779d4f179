"""The manifest of a bundle: what it holds, from what it was made, and the hash of every file.

A manifest is untrusted: it is validated field by field before anything is opened, and its paths can't leave the bundle.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from adacorr_deploy.core.engine_build import EngineBuild
from adacorr_deploy.core.errors import BundleError, SchedulerError
from adacorr_deploy.core.prompts import TEXT_ENCODER_PART, TOKENIZER_FILE, TextEncoderSpec, text_encoder_spec
from adacorr_deploy.core.schedules import FlowSchedule, NoiseSchedule
from adacorr_deploy.core.specs import DECODE_PART, DecoderSpec, ModelSpec, PartSpec, decode_spec
from adacorr_deploy.core.untrusted import clipped, first_fault, value_from_json

SCHEMA_VERSION: Final = 3
MANIFEST_NAME: Final = "manifest.json"
MAX_TEXT: Final = 256  # characters of a name
_MAX_PATH: Final = 1024
_MAX_PARTS: Final = 10_000
_MAX_FILES: Final = 100_000


def bundle_path(path: str) -> str:
    """Return `path` if it is relative, in its shortest form and can't leave the bundle.

    Raises:
        ValueError: If it is not.
    """
    parts = PurePosixPath(path).parts
    # Backslashes and colons are separators and drives on Windows; control characters make the file system raise.
    if not parts or path.startswith("/") or ".." in parts or any(c in "\\:" or not c.isprintable() for c in path):
        raise ValueError(f"{clipped(path)} is not a path inside the bundle")
    if path != "/".join(parts):  # so that two paths are the same file only if they are equal
        raise ValueError(f"{clipped(path)} is not in its shortest form")
    return path


def plain_text(text: str) -> str:
    """Return `text` if it can be shown as it is: short, and without control characters.

    Raises:
        ValueError: If it can't.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"{clipped(text)} has {len(text)} characters, allowed are {MAX_TEXT}")
    if not text.isprintable():
        raise ValueError(f"{clipped(text)} holds control characters")
    return text


BundlePath = Annotated[str, Field(max_length=_MAX_PATH), AfterValidator(bundle_path)]
PlainText = Annotated[str, AfterValidator(plain_text)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A preset, maybe with its knob, maybe with a correction on top. No path: a bundle names no policy file outside itself.
PRESET_PATTERN: Final = r"^[a-z][a-z0-9-]*(@[0-9.]+)?(\+[a-z][a-z-]*(@[0-9.]+)?)?$"
PresetName = Annotated[str, Field(pattern=PRESET_PATTERN)]


def _kind_of_schedule(schedule: object) -> str:
    flow = "flow_steps" in schedule if isinstance(schedule, dict) else isinstance(schedule, FlowSchedule)
    return "flow" if flow else "noise"


TrainingSchedule = Annotated[
    Annotated[NoiseSchedule, Tag("noise")] | Annotated[FlowSchedule, Tag("flow")], Discriminator(_kind_of_schedule)
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Frozen):
    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0)]


class PartRecord(_Frozen):
    """A part's ONNX file and what the backend made of it (the same path where the backend opens ONNX itself).

    `weights` is the file whose tensors are further inputs of the artefact, where engines take weights as inputs.
    """

    spec: PartSpec
    onnx: BundlePath
    artefact: BundlePath
    weights: BundlePath | None = None
    build_seconds: Annotated[float, Field(ge=0)]


class Manifest(_Frozen):
    """Everything the runtime needs to open a bundle."""

    schema_version: int
    model_name: PlainText
    model: ModelSpec
    checkpoint_sha256: Sha256
    schedule: TrainingSchedule
    backend: PlainText
    export_seconds: Annotated[float, Field(ge=0)] = 0.0  # of all parts; what compiling took stands with each
    engine_build: EngineBuild | None = None  # None where the backend opens the ONNX files themselves
    parts: Annotated[dict[PlainText, PartRecord], Field(max_length=_MAX_PARTS)]
    files: Annotated[dict[BundlePath, FileRecord], Field(max_length=_MAX_FILES)]
    tool_versions: dict[PlainText, PlainText]
    class_names: tuple[PlainText, ...] | None = None  # by label
    default_policy: PresetName = "robust"  # of a run that names none
    decoder: DecoderSpec | None = None  # of models whose latents a VAE decodes
    text_encoder: TextEncoderSpec | None = None  # of models that take prompts, with TOKENIZER_FILE beside it
    null_prompt: BundlePath | None = None  # of images without condition, of models that take prompts

    @model_validator(mode="after")
    def _decoder_fits(self) -> Manifest:
        part = self.parts.get(DECODE_PART)
        if self.decoder is None:
            if part is not None:
                raise ValueError(f"parts holds {DECODE_PART}, and decoder doesn't say how it is used")
            return self
        if part is None or part.spec != decode_spec(self.model, self.decoder):
            raise ValueError(f"decoder says what part {DECODE_PART} does, which the bundle has not, or another")
        for (_, _, length), tile in zip(self.model.latents.ranges[-2:], self.decoder.tile, strict=True):
            if tile > length or (tile < length and self.decoder.overlap >= tile):
                raise ValueError(
                    f"decoder has tiles of {tile} with an overlap of {self.decoder.overlap}, allowed are tiles up to "
                    f"the latents' {length}, that overlap by less than themselves"
                )
        return self

    @model_validator(mode="after")
    def _text_encoder_fits(self) -> Manifest:
        part, prompt = self.parts.get(TEXT_ENCODER_PART), self.model.conditions.prompt
        if self.text_encoder is None:
            if part is not None:
                raise ValueError(f"parts holds {TEXT_ENCODER_PART}, and text_encoder doesn't say how it is used")
            return self
        if prompt is None:
            raise ValueError("text_encoder says how prompts are encoded, and the model takes no prompts")
        if part is None or part.spec != text_encoder_spec(prompt):
            raise ValueError(f"text_encoder needs part {TEXT_ENCODER_PART}, which the bundle has not, or another")
        if TOKENIZER_FILE not in self.files:
            raise ValueError(f"text_encoder needs the file {TOKENIZER_FILE}, which has no hash")
        return self

    @model_validator(mode="after")
    def _null_prompt_fits(self) -> Manifest:
        if self.null_prompt is None:
            return self
        if self.model.conditions.prompt is None:
            raise ValueError("null_prompt names a file, and the model takes no prompts")
        if self.null_prompt not in self.files:
            raise ValueError(f"null_prompt names {clipped(self.null_prompt)}, which has no hash")
        return self

    @model_validator(mode="after")
    def _one_name_per_class(self) -> Manifest:
        if self.class_names is not None and len(self.class_names) != self.model.num_classes:
            raise ValueError(
                f"class_names holds {len(self.class_names)} names, the model has {self.model.num_classes} classes"
            )
        return self


def manifest_from_json(text: str, *, where: str) -> Manifest:
    """Parse and validate a manifest.

    Args:
        text: Content of `manifest.json`.
        where: The bundle's path, for the messages.

    Raises:
        BundleError: If it is not JSON, of another schema version, or any field is not valid.
    """
    try:
        raw = value_from_json(text)
    except ValueError as error:
        raise BundleError(
            f"{where}: {MANIFEST_NAME} is not JSON ({error}). Rebuild the bundle with adacorr-build."
        ) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):  # True == 1
        raise BundleError(
            f"{where}: schema version {clipped(version)}, this release reads {SCHEMA_VERSION}. "
            "Rebuild the bundle with adacorr-build."
        )
    try:
        return Manifest.model_validate_json(text)
    except SchedulerError as error:
        raise BundleError(
            f"{where}: {MANIFEST_NAME}: schedule: {error} Rebuild the bundle with adacorr-build."
        ) from error
    except ValidationError as error:
        raise BundleError(
            f"{where}: {MANIFEST_NAME}: {first_fault(error)}. Rebuild the bundle with adacorr-build."
        ) from error


def file_record(path: Path) -> FileRecord:
    """Return the size and SHA-256 of a file, read once in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return FileRecord(sha256=digest.hexdigest(), size_bytes=path.stat().st_size)
