"""The golden sample is what diffusers makes of the checkpoint, whatever the bundle was built for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.core.engine_build import EngineBuild, Profile, WeightLayout
from adacorr_deploy.core.errors import BundleError, CheckpointError
from adacorr_deploy.core.golden import GoldenSample
from adacorr_deploy.core.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest
from adacorr_deploy.core.schedules import NoiseSchedule
from adacorr_deploy.core.specs import DType
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.quality.golden import store_golden_sample
from adacorr_deploy.quality.metrics import relative_l2
from adacorr_deploy.quality.reference import diffusers_latents
from adacorr_deploy.quality.validate import TOLERANCES
from adacorr_deploy.runtime import SampleRequest
from tests.exporters.conftest import loaded, random_dit


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(random_dit(seed=3))


def bundle_without_engines(path: Path, model: LoadedModel, precision: DType, profile: Profile | None = None) -> Bundle:
    """Write a bundle's manifest alone: no engine may be opened."""
    path.mkdir()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model_name=model.name,
        model=model.model.spec(precision, 1),
        checkpoint_sha256=model.checkpoint_sha256,
        schedule=model.schedule,
        backend="tensorrt-rtx",
        engine_build=EngineBuild(version="1.7.0", targets=(), weights=WeightLayout.BAKED, profile=profile)
        if profile is not None
        else None,
        parts={},
        files={},
        tool_versions={},
    )
    (path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return open_bundle(path)


def golden_of(bundle: Bundle) -> GoldenSample:
    (name,) = open_bundle(bundle.path).manifest.files
    return GoldenSample.model_validate_json(bundle.file(name).read_bytes())


@pytest.mark.parametrize("precision", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_it_is_diffusers_own_image_and_tells_the_precisions_tolerance(
    model: LoadedModel, tmp_path: Path, precision: DType
) -> None:
    bundle = bundle_without_engines(tmp_path / "bundle", model, precision, Profile())
    stored = store_golden_sample(bundle, model)
    assert stored == open_bundle(bundle.path)
    golden = golden_of(bundle)
    assert golden.label is not None
    request = SampleRequest((golden.label,), steps=golden.steps, guidance=golden.guidance)
    assert request.branches == 2
    shape = model.model.spec(precision, 1).latent_shape
    initial, final = (latents.reshape(1, *shape) for latents in (golden.initial, golden.final))
    expected = diffusers_latents(model, model.schedule, request, initial)
    assert relative_l2(final, expected) < 1e-4
    assert relative_l2(final, initial) > 0.1
    assert golden.tolerance == TOLERANCES[precision].trajectory


def test_making_it_again_gives_the_same_file(model: LoadedModel, tmp_path: Path) -> None:
    bundle = bundle_without_engines(tmp_path / "bundle", model, DType.FLOAT32)
    first = store_golden_sample(bundle, model).manifest.files
    assert store_golden_sample(bundle, model).manifest.files == first
    assert len(list((bundle.path / "golden").iterdir())) == len(first) == 1


@pytest.mark.parametrize(("steps", "expected"), [((1, 50, 100), 4), ((1, 1, 2), 2), ((1, 1, 1), 1), ((10, 20, 30), 10)])
def test_it_takes_as_many_steps_as_the_engines_do(
    model: LoadedModel, tmp_path: Path, steps: tuple[int, int, int], expected: int
) -> None:
    bundle = bundle_without_engines(tmp_path / "bundle", model, DType.FLOAT16, Profile(steps=steps))
    store_golden_sample(bundle, model)
    assert golden_of(bundle).steps == expected


def test_a_short_schedule_is_not_exceeded(model: LoadedModel, tmp_path: Path) -> None:
    assert isinstance(model.schedule, NoiseSchedule)
    short = replace(model, schedule=replace(model.schedule, betas=model.schedule.betas[:3]))
    bundle = bundle_without_engines(tmp_path / "bundle", short, DType.FLOAT32)
    store_golden_sample(bundle, short)
    assert golden_of(bundle).steps == 3


def test_a_model_whose_own_latents_overflow_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    module = random_dit()
    torch.nn.init.constant_(module.proj_out_2.weight, 3e38)
    broken = loaded(module)
    bundle = bundle_without_engines(tmp_path / "bundle", broken, DType.FLOAT32)
    with pytest.raises(CheckpointError, match=r"random: after 4 steps of ddim, .* NaN or infinite values. Check"):
        store_golden_sample(bundle, broken)
    assert [path.name for path in bundle.path.iterdir()] == [MANIFEST_NAME]


def test_another_checkpoint_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    bundle = bundle_without_engines(tmp_path / "bundle", model, DType.FLOAT32)
    with pytest.raises(BundleError, match="was built from random"):
        store_golden_sample(bundle, replace(model, checkpoint_sha256="1" * 64))
    assert not (bundle.path / "golden").exists()


def test_progress_counts_the_steps(model: LoadedModel, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    bundle = bundle_without_engines(tmp_path / "bundle", model, DType.FLOAT32)
    store_golden_sample(bundle, model, lambda what, done, total: told.append((what, done, total)))
    assert told == [("golden sample", done, 4) for done in range(5)]


def test_what_progress_raises_leaves_nothing(model: LoadedModel, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    bundle = bundle_without_engines(tmp_path / "bundle", model, DType.FLOAT32)
    before = (bundle.path / MANIFEST_NAME).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        store_golden_sample(bundle, model, interrupt)
    assert (bundle.path / MANIFEST_NAME).read_bytes() == before
    assert not (bundle.path / "golden").exists()


def test_the_modules_are_the_checkpoints_own_and_stay_as_they_were(model: LoadedModel, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.model.module.state_dict().items()}
    places = {name: value.data_ptr() for name, value in model.model.module.state_dict().items()}
    store_golden_sample(bundle_without_engines(tmp_path / "bundle", model, DType.FLOAT16), model)
    after = model.model.module.state_dict()
    assert {name: value.data_ptr() for name, value in after.items()} == places
    assert all(np.array_equal(after[name].numpy(), value.numpy()) for name, value in before.items())
