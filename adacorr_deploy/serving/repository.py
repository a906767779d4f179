"""A Triton model repository around a bundle: everything that a server needs, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Final

import adacorr_deploy
from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, policy_from_file, policy_named
from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.core.errors import BundleError, OutputError, PolicyError, RequestError
from adacorr_deploy.core.manifest import MANIFEST_NAME, PRESET_PATTERN, Manifest
from adacorr_deploy.core.output_folder import FolderKind, check_output_folder, output_folder
from adacorr_deploy.core.samplers import Sampler, allowed_samplers
from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.images import gives_images
from adacorr_deploy.runtime.measurements import calibrations
from adacorr_deploy.runtime.sampling import lookups_for_request, run_of_request
from adacorr_deploy.serving.config_text import (
    STREAM_SUFFIX,
    Machine,
    ModelChoice,
    sampling_config,
    stream_config,
)
from adacorr_deploy.serving.local_server import FORWARDED_HEADERS
from adacorr_deploy.serving.request_words import asked_of_client, words_for
from adacorr_deploy.serving.server_packages import SERVER_IMAGE, requirements, telemetry_requirements
from adacorr_deploy.serving.settings import (
    BUNDLE_NAME,
    CPU_BACKEND,
    POLICIES_DIR,
    SETTINGS_NAME,
    Limits,
    Quality,
    RunDefaults,
    ServingSettings,
)
from adacorr_deploy.serving.tensors import inputs_for, outputs_for

ABOUT_NAME: Final = "adacorr-repository.json"
REPOSITORY: Final = FolderKind(
    name="repository of adacorr-serve", is_one=lambda path: (path / ABOUT_NAME).is_file(), inner=""
)

_PACKAGES: Final = ("core", "caching", "plugins", "engines", "runtime", "serving")  # what runs on a server
_TEMPLATES: Final = Path(__file__).parent / "templates"
_COPIED: Final = ("client.py", "healthcheck.py", "grafana-dashboard.json")
_VERSION: Final = "1"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_CALIBRATED_TIERS: Final = {Quality.EXACT: "none", Quality.BALANCED: "robust", Quality.FAST: "robust@3"}
_UNCALIBRATED_TIERS: Final = {Quality.EXACT: "none", Quality.BALANCED: "fora@2", Quality.FAST: "fora@3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryOptions:
    """What a repository is to be like.

    Attributes:
        name: Of the model; None takes the bundle's.
        overwrite: Replace the repository that stands there.
        limits: Of requests and of the queue.
        quality: Policies of tiers, in place of those that suit the bundle.
        policy_files: Policies that requests may name by their files' names.
    """

    name: str | None = None
    overwrite: bool = False
    limits: Limits = field(default_factory=Limits)
    quality: Mapping[Quality, str] = field(default_factory=dict)
    policy_files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository that was written."""

    path: Path
    settings: ServingSettings
    asked: str  # what client.py is told of a request to try

    @property
    def model(self) -> str:
        return self.settings.model


def write_repository(bundle_path: Path, output: Path, options: RepositoryOptions) -> Repository:
    """Write a repository for Triton Inference Server.

    Args:
        bundle_path: Of the bundle; it is copied, its hashes checked before and, by the server, after.
        output: The repository's folder. It appears whole, or not at all.
        options: See there.

    Raises:
        BundleError: If the bundle is altered or incomplete.
        RequestError: If the model's name can't be one.
        PolicyError: If a policy is not valid, or needs a calibration that the bundle doesn't hold.
        OutputError: If the output exists, or can't be written.
        BackendUnavailableError: If tritonclient is not installed.
    """
    check_output_folder(output, overwrite=options.overwrite, kind=REPOSITORY)
    bundle = open_bundle(bundle_path)
    if output.resolve().is_relative_to(bundle.path.resolve()):
        raise OutputError(f"{output} lies in the bundle {bundle.path}, which is only read. Choose another folder.")
    settings = _settings(bundle, options)
    configured = configs(settings.model, bundle.manifest)
    with output_folder(output, overwrite=options.overwrite, kind=REPOSITORY) as folder:
        for name, text in {**configured, **_papers(settings, bundle.manifest)}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        version = folder / settings.model / _VERSION
        version.mkdir(parents=True)
        _fill_version(version, bundle, settings, options)
        stream = folder / f"{settings.model}{STREAM_SUFFIX}" / _VERSION
        stream.mkdir(parents=True)
        shutil.copyfile(_TEMPLATES / "stream_model.py", stream / "model.py")
    return Repository(
        path=output, settings=settings, asked=asked_of_client(bundle.manifest, settings.limits.max_images)
    )


# --- Settings ----------------------------------------------------------------------------------------------------


def _settings(bundle: Bundle, options: RepositoryOptions) -> ServingSettings:
    name = options.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", bundle.manifest.model_name).strip("_.-") or "model"
    if not _NAME.fullmatch(name) or name.endswith(STREAM_SUFFIX):
        raise RequestError(
            f"The model's name {name!r} can't be a folder's: allowed are up to 64 letters, digits, dots, dashes and "
            f"underscores, not ending in {STREAM_SUFFIX}. Choose another with --name."
        )
    measured = list(calibrations(bundle).values())
    of_robust = [each.key for each in measured if each.predictor == PRESETS[DEFAULT_POLICY].predictor]
    runs = of_robust or [each.key for each in measured]
    tiers = {**(_CALIBRATED_TIERS if of_robust else _UNCALIBRATED_TIERS), **options.quality}
    defaults = (
        RunDefaults(steps=runs[0].steps, guidance=runs[0].guidance, sampler=Sampler(runs[0].sampler))
        if runs
        else RunDefaults(sampler=_usual_sampler(bundle.manifest))
    )
    for tier, policy in tiers.items():
        _check_tier(bundle, defaults, tier, policy)
    return ServingSettings(
        model=name, defaults=defaults, limits=options.limits, quality=tiers, policies=_shipped(options.policy_files)
    )


def _check_tier(bundle: Bundle, defaults: RunDefaults, tier: Quality, name: str) -> None:
    """Refuse a tier's policy that requests with the defaults would be refused for, one by one.

    Raises:
        PolicyError: If it is no preset, or doesn't fit the bundle.
        CalibrationError: If the bundle doesn't hold what it looks up.
    """
    policy = policy_named(name)
    if not re.fullmatch(PRESET_PATTERN, name):
        raise PolicyError(
            f"policy {name} of --{tier.value} is no preset. Give one, or let requests name a file, with --policy-file."
        )
    request = SampleRequest((0,), steps=defaults.steps, guidance=defaults.guidance, sampler=defaults.sampler)
    request = example_request(bundle.manifest.model, request, (0,))
    lookups_for_request(bundle, request, policy)
    if policy.caches:  # whose spans need blocks
        policy.spans_of(run_of_request(bundle, request, policy))


def _usual_sampler(manifest: Manifest) -> Sampler:
    """Return ddim, or what a model takes that doesn't take it."""
    allowed = allowed_samplers(manifest.schedule)
    return Sampler.DDIM if Sampler.DDIM in allowed else allowed[0]


def _shipped(files: tuple[Path, ...]) -> dict[str, str]:
    """Return the file that each policy name stands for, after reading them all."""
    shipped: dict[str, str] = {}
    for file in files:
        policy_from_file(file)
        if file.stem in PRESETS or file.stem in shipped:
            raise PolicyError(f"policy file {file}: its name {file.stem} is taken. Rename the file.")
        shipped[file.stem] = file.name
    return shipped


# --- Files -------------------------------------------------------------------------------------------------------


def configs(model: str, manifest: Manifest) -> dict[str, str]:
    """Return the configurations by their places: the plain one for a GPU, and one for the CPU."""
    inputs, outputs = inputs_for(manifest), outputs_for(manifest)
    on_gpu = "onnxruntime-cuda" if manifest.backend == CPU_BACKEND else manifest.backend
    return {
        f"{model}/config.pbtxt": sampling_config(
            ModelChoice(name=model, machine=Machine.GPU, backend=on_gpu, inputs=inputs, outputs=outputs)
        ),
        f"{model}/configs/cpu.pbtxt": sampling_config(
            ModelChoice(name=model, machine=Machine.CPU, backend=CPU_BACKEND, inputs=inputs, outputs=outputs)
        ),
        f"{model}{STREAM_SUFFIX}/config.pbtxt": stream_config(model, inputs, outputs),
    }


def _papers(settings: ServingSettings, manifest: Manifest) -> dict[str, str]:
    """Return what stands beside the models, by name."""
    words = {
        "model": settings.model,
        "bundle": manifest.model_name,
        "version": adacorr_deploy.__version__,
        "image": SERVER_IMAGE,
        "forwarded": FORWARDED_HEADERS,
        "steps": str(settings.defaults.steps),
        "guidance": f"{settings.defaults.guidance:g}",
        "max_images": str(settings.limits.max_images),
        "max_queue": str(settings.limits.max_queue),
        **words_for(manifest, settings.limits.max_images),
        "tiers": ", ".join(f"`{tier.value}` = `{policy}`" for tier, policy in settings.quality.items()),
        "policies": ", ".join(f"`{name}`" for name in settings.policies) or "none",
    }
    about = {
        "model": settings.model,
        "adacorr_deploy": adacorr_deploy.__version__,
        "gives": "png" if gives_images(manifest) else "latents",
    }
    return {
        "README.md": _filled("README.md.txt", words),
        "Dockerfile": _filled("Dockerfile.txt", words),
        **{name: (_TEMPLATES / name).read_text(encoding="utf-8") for name in _COPIED},
        **{
            f"requirements-{machine.value}.txt": requirements(machine, text=manifest.text_encoder is not None)
            for machine in Machine
        },
        "requirements-telemetry.txt": telemetry_requirements(),
        ABOUT_NAME: json.dumps(about, indent=1) + "\n",
    }


def _filled(template: str, words: Mapping[str, str]) -> str:
    return Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(words)


def _fill_version(version: Path, bundle: Bundle, settings: ServingSettings, options: RepositoryOptions) -> None:
    shutil.copyfile(_TEMPLATES / "model.py", version / "model.py")
    (version / SETTINGS_NAME).write_text(settings.model_dump_json(indent=1), encoding="utf-8")
    _copy_bundle(bundle, version / BUNDLE_NAME)
    _copy_package(version / "adacorr_deploy")
    if options.policy_files:
        (version / POLICIES_DIR).mkdir()
        for file in options.policy_files:
            shutil.copyfile(file, version / POLICIES_DIR / file.name)


def _copy_bundle(bundle: Bundle, target: Path) -> None:
    """Copy the files that a bundle lists, and check the copy."""
    for name in (*bundle.manifest.files, MANIFEST_NAME):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(name), target / name)
    copied = open_bundle(target)
    if copied.manifest != bundle.manifest:
        raise BundleError(f"{bundle.path} was changed while it was copied. Run adacorr-serve again.")


def _copy_package(target: Path) -> None:
    """Copy the part of this package that serves; links in a source tree are followed."""
    source = Path(adacorr_deploy.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    target.mkdir()
    for name in ("__init__.py", "py.typed"):
        shutil.copyfile(source / name, target / name)
    for name in _PACKAGES:
        shutil.copytree(source / name, target / name, ignore=ignored)
