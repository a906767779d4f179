"""Invariant: a bundle passes exactly if it computes what its PyTorch model does, and the part that doesn't is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.core.errors import BundleError, RequestError
from adacorr_deploy.core.manifest import MANIFEST_NAME
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.schedules import Distillation, DynamicShift, FlowSchedule, NoiseSchedule, Schedule
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines import Artefact, Backend, Session
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend, OnnxRuntimeSession
from adacorr_deploy.engines.torch_reference import TorchBackend, TorchSession
from adacorr_deploy.exporters import LoadedModel
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.exporters.dit_adapter import DiTModel
from adacorr_deploy.quality.validate import TOLERANCES, ValidateOptions, Validation, validate_bundle
from adacorr_deploy.runtime import pipeline
from tests.exporters.conftest import loaded, random_dit
from tests.quality.altered_bundles import rehash, scale_largest_weight

Build = Callable[[DType], Bundle]
STEPS = 8
OPTIONS = ValidateOptions(steps=STEPS)
BLOCKS = (2, 1)  # three transformer blocks in segments of two


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A model with learned variance whose outputs are about as large as a trained one's."""
    module = random_dit(seed=3)
    module.proj_out_2.weight.mul_(0.2)
    return loaded(module)


@pytest.fixture(scope="module")
def bundle_of(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Build:
    @cache
    def build(precision: DType) -> Bundle:
        options = BuildOptions(precision=precision, segment=2)
        output = tmp_path_factory.mktemp("bundles") / precision.value
        return build_bundle(model, output, OnnxRuntimeBackend(threads=1), options)

    return build


@pytest.fixture
def bundle(bundle_of: Build, tmp_path: Path) -> Bundle:
    """A float32 bundle that the test may alter."""
    return open_bundle(Path(shutil.copytree(bundle_of(DType.FLOAT32).path, tmp_path / "bundle")))


def assert_passes(validation: Validation) -> None:
    assert validation.failed_parts == ()
    assert validation.passed, validation.to_json()


DIFFUSION = [Sampler.DDIM, Sampler.DDPM, Sampler.DPMPP_2M, Sampler.DPMPP_2M_SDE]


@pytest.mark.parametrize("sampler", DIFFUSION)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_bundle_agrees_with_its_model(
    sampler: Sampler, guidance: float, model: LoadedModel, bundle_of: Build
) -> None:
    bundle = bundle_of(DType.FLOAT32)
    validation = validate_bundle(bundle.path, model, replace(OPTIONS, sampler=sampler, guidance=guidance))
    assert_passes(validation)
    assert list(validation.parts) == list(bundle.manifest.parts)
    assert validation.trajectory.rel_l2 <= 1e-4
    assert 0 < validation.trajectory.engine_rel_l2 <= 1e-4
    assert validation.trajectory.policy_psnr_db == np.inf  # `none` is the chain itself


@pytest.mark.parametrize(
    ("schedule", "sampler"),
    [
        (NoiseSchedule(betas=(0.01,) * 1000, distillation=Distillation(steps=50)), Sampler.LCM),
        (FlowSchedule(flow_steps=1000, shift=3.0), Sampler.FLOW_EULER),
        (FlowSchedule(flow_steps=1000, dynamic_shift=DynamicShift(base_tokens=4)), Sampler.FLOW_EULER),
        (FlowSchedule(flow_steps=1000, unshifted_tokens=4), Sampler.FLOW_EULER),
    ],
)
def test_few_step_and_flow_matching_models_agree_by_their_own_sampler(
    schedule: Schedule, sampler: Sampler, model: LoadedModel, bundle: Bundle
) -> None:
    manifest = bundle.manifest.model_copy(update={"schedule": schedule})
    (bundle.path / MANIFEST_NAME).write_text(manifest.model_dump_json())
    assert open_bundle(bundle.path).manifest.schedule == schedule  # also when read again
    validation = validate_bundle(bundle.path, replace(model, schedule=schedule), OPTIONS)
    assert_passes(validation)
    assert validation.trajectory.request.sampler is sampler
    assert validation.trajectory.rel_l2 <= 1e-4


def test_ddims_noise_is_diffusers_own(model: LoadedModel, bundle_of: Build) -> None:
    validation = validate_bundle(bundle_of(DType.FLOAT32).path, model, replace(OPTIONS, eta=0.8))
    assert_passes(validation)
    assert validation.trajectory.rel_l2 <= 1e-4
    assert validation.trajectory.rms > 0


def test_float16_passes_by_its_own_tolerance_only(model: LoadedModel, bundle_of: Build) -> None:
    validation = validate_bundle(bundle_of(DType.FLOAT16).path, model, OPTIONS)
    assert_passes(validation)
    errors = {name: error.rel_l2 for name, error in validation.parts.items()}
    assert max(errors.values()) <= TOLERANCES[DType.FLOAT16].part / 3  # not passed by a hair
    assert min(errors["block_00"], errors["head"], errors["predict_2"]) > TOLERANCES[DType.FLOAT32].part
    assert validation.trajectory.engine_rel_l2 > 1e-4


def test_the_json_is_the_contract(model: LoadedModel, bundle_of: Build) -> None:
    bundle = bundle_of(DType.FLOAT32)
    content = json.loads(validate_bundle(bundle.path, model, OPTIONS).to_json())
    assert list(content) == ["parts", "trajectory", "passed"]
    assert content["parts"].keys() == bundle.manifest.parts.keys()
    assert all(list(error) == ["max_abs", "rel_l2"] for error in content["parts"].values())
    numbers = ["max_abs", "rel_l2", "engine_rel_l2"]
    assert list(content["trajectory"]) == ["steps", "guidance", "sampler", *numbers, "policy", "policy_psnr_db"]
    given = {"steps": STEPS, "guidance": 4.0, "sampler": "ddim", "policy": "none", "policy_psnr_db": None}
    assert content["trajectory"].items() >= given.items()
    assert content["passed"] is True


def test_a_policys_error_is_not_the_engines(model: LoadedModel, bundle_of: Build) -> None:
    options = replace(OPTIONS, policy=PRESETS["fora"], sampler=Sampler.DDPM)
    validation = validate_bundle(bundle_of(DType.FLOAT32).path, model, options)
    assert_passes(validation)
    assert validation.trajectory.policy == "fora"
    assert 0 < validation.trajectory.policy_psnr_db < 80
    assert validation.trajectory.engine_rel_l2 <= 1e-4


@pytest.mark.parametrize("part", ["embed", "block_01", "head"])
def test_an_altered_weight_fails_its_part_alone(part: str, model: LoadedModel, bundle: Bundle) -> None:
    scale_largest_weight(bundle, part, 1.01)
    validation = validate_bundle(bundle.path, model, OPTIONS)
    assert validation.failed_parts == (part,)
    assert not validation.trajectory.passed
    assert not validation.passed


def test_an_altered_service_part_fails_by_the_oracle(model: LoadedModel, bundle: Bundle) -> None:
    path = bundle.file("parts/signals.onnx")
    graph = onnx.load(str(path))
    (epsilon,) = (each for node in graph.graph.node for each in node.attribute if each.name == "epsilon")
    epsilon.f = 1.0
    path.write_bytes(graph.SerializeToString())
    rehash(bundle, "parts/signals.onnx")
    validation = validate_bundle(bundle.path, model, OPTIONS)
    assert validation.failed_parts == ("signals",)
    assert validation.trajectory.passed  # no policy took part
    assert not validation.passed


def test_nan_never_passes_and_stays_out_of_the_json(model: LoadedModel, bundle: Bundle) -> None:
    scale_largest_weight(bundle, "block_00", np.nan)
    validation = validate_bundle(bundle.path, model, OPTIONS)
    assert validation.failed_parts == ("block_00",)
    assert not validation.passed
    content = json.loads(validation.to_json())
    assert content["parts"]["block_00"] == {"max_abs": None, "rel_l2": None}
    assert content["trajectory"]["rel_l2"] is None
    assert content["passed"] is False


def test_another_checkpoint_is_refused_by_name(model: LoadedModel, bundle_of: Build) -> None:
    other = replace(model, name="other", checkpoint_sha256="1" * 64)
    with pytest.raises(BundleError, match=rf"built from random \(.*{'0' * 64}\).* reference is other .*{'1' * 64}"):
        validate_bundle(bundle_of(DType.FLOAT32).path, other, OPTIONS)


def test_another_model_under_the_same_hash_is_refused(model: LoadedModel, bundle_of: Build) -> None:
    other = replace(model, model=DiTModel(random_dit(learned_variance=False)))
    with pytest.raises(BundleError, match="another model than the reference"):
        validate_bundle(bundle_of(DType.FLOAT32).path, other, OPTIONS)


def test_images_must_be_positive(model: LoadedModel, bundle_of: Build) -> None:
    with pytest.raises(RequestError, match="images is 0"):
        validate_bundle(bundle_of(DType.FLOAT32).path, model, replace(OPTIONS, images=0))


def test_progress_is_told_of_every_part_and_nothing_is_printed(
    model: LoadedModel, bundle_of: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = bundle_of(DType.FLOAT32)
    capfd.readouterr()
    told: list[tuple[str, int, int]] = []
    validate_bundle(
        bundle.path, model, replace(OPTIONS, steps=2), lambda what, done, total: told.append((what, done, total))
    )
    parts = len(bundle.manifest.parts)
    assert [what for what, *_ in told[:parts]] == list(bundle.manifest.parts)
    assert [done for _, done, _ in told] == list(range(parts + 5))
    assert told[-1] == ("", parts + 4, parts + 4)
    assert capfd.readouterr() == ("", "")


def test_the_reference_is_the_models_own_forward(model: LoadedModel) -> None:
    rows, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 10])
    timesteps = torch.tensor([500, 500])
    expected = model.model.module(rows, timestep=timesteps, class_labels=labels).sample
    torch.testing.assert_close(model.model.predict(rows, timesteps, {"labels": labels}), expected, rtol=0, atol=0)


def test_the_bundle_is_opened_once_each_part_too_and_all_is_closed(
    model: LoadedModel, bundle_of: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, list[str]] = {"engine": [], "reference": []}
    closed: dict[str, list[str]] = {"engine": [], "reference": []}
    bundles: list[Path] = []

    def counted(who: str, backend: type[Backend], session: type[Session]) -> None:
        open_, close = backend.open, session.close

        def counted_open(self: Backend, artefact: Artefact, spec: PartSpec) -> Session:
            opened[who].append(spec.name)
            return open_(self, artefact, spec)

        def counted_close(self: Session) -> None:
            closed[who].append(self.spec.name)
            close(self)

        monkeypatch.setattr(backend, "open", counted_open)
        monkeypatch.setattr(session, "close", counted_close)

    def counted_bundle(path: Path) -> Bundle:
        bundles.append(path)
        return open_bundle(path)

    counted("engine", OnnxRuntimeBackend, OnnxRuntimeSession)
    counted("reference", TorchBackend, TorchSession)
    monkeypatch.setattr(pipeline, "open_bundle", counted_bundle)
    bundle = bundle_of(DType.FLOAT32)
    validate_bundle(bundle.path, model, replace(OPTIONS, steps=2))
    assert bundles == [bundle.path]
    assert sorted(opened["engine"]) == sorted(closed["engine"]) == sorted(bundle.manifest.parts)
    assert sorted(opened["reference"]) == sorted(closed["reference"])
    assert len(opened["reference"]) == len(set(opened["reference"])) == len(bundle.manifest.model.units) + 3
