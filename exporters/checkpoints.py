"""From a path to a model: a diffusers pipeline or transformer folder, or a checkpoint in a family's original layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import CheckpointError, SchedulerError, UnsupportedModelError
from adacorr_deploy.core.manifest import plain_text
from adacorr_deploy.core.scheduler_config import schedule_from_config
from adacorr_deploy.core.schedules import NoiseSchedule, Schedule
from adacorr_deploy.core.specs import DType
from adacorr_deploy.core.untrusted import clipped
from adacorr_deploy.exporters.adapter import EXPORTERS, KNOWN_CLASSES, ExportableModel, adapter_for, check_class
from adacorr_deploy.exporters.config_files import PIPELINE_INDEX, folder_in_pipeline, json_object
from adacorr_deploy.exporters.family_parts import family_parts, family_step_part
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.text_encoder import LoadedTextEncoder, load_text_encoder
from adacorr_deploy.exporters.vae import LoadedVae, load_vae
from adacorr_deploy.exporters.weight_files import checkpoint_sha256, state_dict_from_files, weight_files

_CORRECT_LABELS: Final = "Correct it, or remove id2label."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A checkpoint in memory, checked.

    Raises:
        CheckpointError: If there is not one name for each class of the model.
    """

    name: str  # of the file or folder
    model: ExportableModel
    schedule: Schedule
    checkpoint_sha256: str  # of the weight files
    class_names: tuple[str, ...] | None  # by label, where the pipeline has them
    vae: LoadedVae | None = None  # decodes the latents; None for models of pixels, or where none was given
    text_encoder: LoadedTextEncoder | None = None  # None for models that take no prompts, or where none was given

    def __post_init__(self) -> None:
        classes = self.model.spec(DType.FLOAT32, 1).num_classes
        if self.class_names is not None and len(self.class_names) != classes:
            raise CheckpointError(
                f"{self.name}: there are {len(self.class_names)} class names, but the model has {classes} classes. "
                "Correct id2label in model_index.json, or remove it."
            )

    def parts(self, precision: DType, segment: int) -> Iterator[Part]:
        """Yield embed, condition, every block part and head; arguments as those of `ExportableModel.spec`."""
        return family_parts(self.model.modules(precision), self.model.spec(precision, segment))

    def step_part(self, precision: DType, segment: int) -> Part:
        """Return embed, blocks and head as one part, with the same inputs as the chain and no units."""
        return family_step_part(self.model.modules(precision), self.model.spec(precision, segment))


def load_checkpoint(
    path: Path,
    scheduler: Path | None = None,
    *,
    heads: int | None = None,
    vae: Path | None = None,
    with_vae: bool = True,
    text_encoder: Path | None = None,
    with_text_encoder: bool = True,
) -> LoadedModel:
    """Load a local checkpoint, weights and schedule. Nothing is fetched, and no code in it is run.

    Args:
        path: A diffusers pipeline folder, a transformer folder, or a checkpoint file in a family's original layout.
        scheduler: A `scheduler_config.json` or its folder; needed beside a transformer folder, and elsewhere taken
            instead of the pipeline's or the original's own.
        heads: Attention heads of an original checkpoint whose size isn't one of the paper's.
        vae: Folder of the VAE that decodes the latents, in place of the pipeline's own.
        with_vae: Whether to load one at all.
        text_encoder: Folder of the encoder of prompts, in place of the pipeline's own; its tokenizer stands in it, or
            in a folder `tokenizer` beside it.
        with_text_encoder: Whether to load one at all, where the model takes prompts.

    Raises:
        CheckpointError: If weights are missing, truncated, unsafe, or don't fit the model.
        UnsupportedModelError: If no exporter knows the model or one of its features.
        SchedulerError: If there is no scheduler, or it can't be written as a sampler table.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} doesn't exist. Give a diffusers folder, or a .pt or .safetensors checkpoint, on this machine: "
            "models that are named as on a hub aren't fetched."
        )
    loaded = _loaded_model(path, scheduler, heads)
    folder = vae or folder_in_pipeline(path, "vae")
    if with_vae and folder is not None:
        loaded = replace(loaded, vae=load_vae(folder))
    return _with_text_encoder(loaded, path, text_encoder) if with_text_encoder else loaded


def _with_text_encoder(loaded: LoadedModel, path: Path, given: Path | None) -> LoadedModel:
    """Load the encoder that was given, or the pipeline's own, where the model takes prompts."""
    takes_prompts = loaded.model.spec(DType.FLOAT32, 1).conditions.prompt is not None
    if given is not None and not takes_prompts:
        raise UnsupportedModelError(f"{given}: {path} takes no prompts, so it has no use for a text encoder.")
    folder = given or folder_in_pipeline(path, "text_encoder")
    if folder is None or not takes_prompts:
        return loaded
    return replace(loaded, text_encoder=load_text_encoder(folder))


def _loaded_model(path: Path, scheduler: Path | None, heads: int | None) -> LoadedModel:
    if path.is_file():
        return _from_original(path, scheduler, heads)
    if (path / PIPELINE_INDEX).exists():
        return _from_pipeline(path, scheduler)
    if (path / "config.json").exists():
        return _from_transformer(path, name=path.resolve().name, scheduler=scheduler)
    raise CheckpointError(
        f"{path} is no diffusers folder: it holds neither model_index.json (a pipeline) nor config.json "
        "(a transformer). Give one of these, or a .pt or .safetensors checkpoint."
    )


def _from_original(path: Path, scheduler: Path | None, heads: int | None) -> LoadedModel:
    state = state_dict_from_files([path], as_stored=True)
    adapter = next((adapter for adapter in EXPORTERS.values() if adapter.is_original(state)), None)
    if adapter is None:
        raise CheckpointError(
            f"{path}: the weight names ({', '.join(list(state)[:3])}, …) are of no known original layout "
            f"(known families: {', '.join(adapter.family for adapter in EXPORTERS.values())}). "
            "For weights by diffusers' names, give the folder with their config.json."
        )
    model = adapter.from_original(state, where=str(path), heads=heads)
    return LoadedModel(
        name=path.stem,
        model=model,
        schedule=_schedule(scheduler, model) if scheduler else model.training_schedule(),
        checkpoint_sha256=checkpoint_sha256([path]),
        class_names=None,
    )


def _from_pipeline(path: Path, scheduler: Path | None) -> LoadedModel:
    index = json_object(path / PIPELINE_INDEX, CheckpointError)
    entry = index.get("transformer")
    if not isinstance(entry, list) or len(entry) != 2:
        raise UnsupportedModelError(
            f"{path}: the pipeline {clipped(index.get('_class_name'))} has no transformer. "
            f"Known transformers: {KNOWN_CLASSES}"
        )
    pipeline = index.get("_class_name")
    check_class(entry[1], where=str(path / PIPELINE_INDEX))
    return _from_transformer(
        path / "transformer",
        name=path.resolve().name,
        scheduler=scheduler or folder_in_pipeline(path, "scheduler"),
        class_names=_class_names(index.get("id2label"), where=str(path / PIPELINE_INDEX)),
        pipeline=pipeline if isinstance(pipeline, str) else None,
    )


def _from_transformer(
    path: Path,
    *,
    name: str,
    scheduler: Path | None,
    class_names: tuple[str, ...] | None = None,
    pipeline: str | None = None,
) -> LoadedModel:
    config = json_object(path / "config.json", CheckpointError)
    adapter = adapter_for(config, where=str(path / "config.json"))
    if scheduler is None:
        raise SchedulerError(
            f"{path} comes without a scheduler. Give a scheduler_config.json or its folder with --scheduler."
        )
    files = weight_files(path)
    model = adapter.from_config(
        config, state_dict_from_files(files, as_stored=True), where=str(path), pipeline=pipeline
    )
    return LoadedModel(
        name=name,
        model=model,
        schedule=_schedule(scheduler, model),
        checkpoint_sha256=checkpoint_sha256(files),
        class_names=class_names,
    )


def _schedule(path: Path, model: ExportableModel) -> Schedule:
    file = path / "scheduler_config.json" if path.is_dir() else path
    config = json_object(file, SchedulerError)
    try:
        schedule = schedule_from_config(config)
    except SchedulerError as error:
        raise SchedulerError(f"{file}: {error}") from error
    if not isinstance(schedule, NoiseSchedule):
        return schedule
    if model.learned_variance and "variance_type" not in config:
        # Many DiT pipelines ship a DDIM configuration, which has no such field: their DDPM is the original's.
        return replace(schedule, variance_type="learned_range")
    if schedule.variance_type == "learned_range" and not model.learned_variance:
        raise SchedulerError(
            f"{file}: variance_type is learned_range, but the model predicts no variance. "
            "Set it to fixed_small or fixed_large."
        )
    return schedule


def _class_names(labels: object, *, where: str) -> tuple[str, ...] | None:
    """Return the names of labels 0 … n − 1, or None where the pipeline has none. Two classes may have the same name.

    Raises:
        CheckpointError: If `labels` is anything but a name for each of these labels.
    """
    if labels is None or labels == {}:
        return None
    if not isinstance(labels, dict):
        raise CheckpointError(f"{where}: id2label is {clipped(labels)}, allowed is a JSON object. {_CORRECT_LABELS}")
    expected = [str(label) for label in range(len(labels))]
    if odd := sorted(labels.keys() - set(expected)):
        raise CheckpointError(
            f"{where}: id2label names label {clipped(odd[0])}; its {len(labels)} names must be those of the labels "
            f"0 … {len(labels) - 1}. {_CORRECT_LABELS}"
        )
    return tuple(_class_name(labels[label], where=f"{where}: id2label: {label}") for label in expected)


def _class_name(name: object, *, where: str) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"{where} is {clipped(name)}, allowed is a name. {_CORRECT_LABELS}")
    try:
        return plain_text(name)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}. {_CORRECT_LABELS}") from error
