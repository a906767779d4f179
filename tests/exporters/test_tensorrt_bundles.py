"""Every part of a model compiles with TensorRT for RTX on a machine without a GPU, in every precision and layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.core.engine_build import CompilerOptions, Profile, WeightLayout
from adacorr_deploy.core.errors import BundleError, EngineError
from adacorr_deploy.core.progress import Progress
from adacorr_deploy.core.shapes import CHUNK, TILE_HEIGHT
from adacorr_deploy.core.specs import HALVES, DType, PartSpec
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.engines.tensorrt_backend import TensorRTBackend
from adacorr_deploy.engines.tensorrt_compiler import TensorRTCompiler
from adacorr_deploy.engines.tensorrt_modules import TENSORRT_RTX
from adacorr_deploy.exporters import LoadedModel, bundle_builder
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.exporters.onnx_parts import export_part
from adacorr_deploy.exporters.vae import load_vae
from adacorr_deploy.plugins.service_parts import service_part_specs
from adacorr_deploy.runtime import Pipeline
from tests.exporters.conftest import Exported, loaded
from tests.exporters.random_vae import random_temporal_vae, write_vae
from tests.models import model_spec

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.trt

TARGETS = ("sm_86", "sm_89", "sm_120")
PROFILE = Profile(batch=(1, 2, 4), steps=(1, 20, 50))


Build = Callable[..., Bundle]  # of a precision and a layout of weights, and of halves


@pytest.fixture(scope="module")
def built(
    dit: DiTTransformer2DModel, exported: Callable[[DType, int], Exported], tmp_path_factory: pytest.TempPathFactory
) -> Build:
    """Build a bundle, once for all tests; the exported parts are those of the other tests."""

    @cache
    def build(precision: DType, weights: WeightLayout, *, halves: bool = False) -> Bundle:
        parts = exported(precision, HALVES if halves else 1)

        def copy_parts(
            model: LoadedModel, directory: Path, precision: DType, segment: int, progress: Progress | None
        ) -> dict[str, PartSpec]:
            specs = {name: spec for name, spec in parts.specs.items() if name != "step"}
            for name in specs:
                for file in parts.folder.glob(f"{name}.*"):
                    shutil.copy(file, directory)
            return specs

        options = CompilerOptions(profile=PROFILE, targets=TARGETS, weights=weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bundle_builder, "export_parts", copy_parts)
            return build_bundle(
                loaded(dit),
                tmp_path_factory.mktemp("bundles") / "bundle",
                TensorRTBackend(TENSORRT_RTX, options),
                BuildOptions(precision=precision, segment=HALVES if halves else 1),
            )

    return build


@pytest.mark.parametrize("precision", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("weights", WeightLayout)
def test_every_part_compiles_and_the_manifest_says_for_what(
    built: Build, precision: DType, weights: WeightLayout
) -> None:
    manifest = built(precision, weights).manifest
    kernels = {name for name in manifest.files if name.endswith(".ptx")}
    assert kernels == {f"engines/tensorrt-rtx/{name}.ptx" for name in ("kernels", "decisions")}
    build = manifest.engine_build
    assert build is not None
    assert (build.targets, build.weights, build.profile) == (TARGETS, weights, PROFILE)
    assert re.fullmatch(r"1\.\d+\.\d+\.\d+", build.version)
    for name, part in manifest.parts.items():
        plan = "kernels.ptx" if name in service_part_specs(manifest.model) else f"{name}.engine"
        if weights is WeightLayout.INPUTS and name.startswith("block"):
            plan = "block_00.engine"
        assert part.artefact == f"engines/tensorrt-rtx/{plan}"
        assert manifest.files[part.artefact].size_bytes > 0, name


@pytest.mark.parametrize("precision", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
def test_the_ops_function_bodies_compile_from_the_same_onnx_files(
    built: Build, tmp_path: Path, precision: DType
) -> None:
    """The runtime launches our kernels, but whoever puts the op into a graph of their own needs no plugin."""
    bundle = built(precision, WeightLayout.INPUTS)
    compiler = TensorRTCompiler(TENSORRT_RTX, CompilerOptions(profile=PROFILE, targets=TARGETS))
    for name, spec in service_part_specs(bundle.manifest.model).items():
        plan = compiler.compile(bundle.file(bundle.manifest.parts[name].onnx), spec, tmp_path).path
        assert plan.stat().st_size > 0, name


def test_blocks_of_one_structure_share_a_plan_whose_weights_are_inputs(built: Build) -> None:
    bundle = built(DType.FLOAT16, WeightLayout.INPUTS)
    blocks = [bundle.manifest.parts[name] for name in bundle.manifest.model.block_names]
    assert len({block.artefact for block in blocks}) == 1
    assert len({block.weights for block in blocks}) == len(blocks) > 1
    assert bundle.manifest.parts["signals"].weights is None


def test_halves_compile_and_those_of_one_kind_share_a_plan(built: Build) -> None:
    for weights in WeightLayout:
        manifest = built(DType.FLOAT16, weights, halves=True).manifest
        plans = [manifest.parts[name].artefact for name in manifest.model.block_names]
        assert len(plans) == 2 * 3
        shared = [f"engines/tensorrt-rtx/block_00_{half}.engine" for half in ("attention", "mlp")]
        assert plans == shared * 3 if weights is WeightLayout.INPUTS else len(set(plans)) == len(plans)
        assert all(manifest.files[plan].size_bytes > 0 for plan in plans)


def test_baked_plans_hold_their_weights(built: Build) -> None:
    bundle = built(DType.FLOAT16, WeightLayout.BAKED)
    blocks = [bundle.manifest.parts[name] for name in bundle.manifest.model.block_names]
    assert len({block.artefact for block in blocks}) == len(blocks)
    assert all(block.weights is None for block in blocks)
    for block in blocks:
        weights = bundle.file(block.onnx).with_suffix(".safetensors").stat().st_size
        assert bundle.manifest.files[block.artefact].size_bytes > weights / 2


def test_the_parts_of_such_a_bundle_also_run_on_a_cpu(built: Build) -> None:
    bundle = built(DType.FLOAT32, WeightLayout.INPUTS)
    with Pipeline.open(bundle.path, backend=OnnxRuntimeBackend(threads=1)) as pipeline:
        assert pipeline.manifest.backend == "tensorrt-rtx"


def test_bfloat16_is_refused_on_a_cpu_with_what_it_runs(built: Build) -> None:
    bundle = built(DType.BFLOAT16, WeightLayout.INPUTS)
    with pytest.raises(EngineError, match=r"Backend onnxruntime runs no bfloat16 models, only float16, float32"):
        Pipeline.open(bundle.path, backend=OnnxRuntimeBackend(threads=1))


def test_an_altered_plan_is_refused_before_it_is_opened(built: Build, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built(DType.FLOAT16, WeightLayout.INPUTS).path, tmp_path / "bundle"))
    plan = copy / "engines" / "tensorrt-rtx" / "head.engine"
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    with pytest.raises(BundleError, match=r"head.engine was altered"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        (DType.FLOAT32, WeightLayout.BAKED),
        (DType.FLOAT16, WeightLayout.INPUTS),
        pytest.param(DType.BFLOAT16, WeightLayout.INPUTS, marks=pytest.mark.slow),
    ],
)
def test_a_vaes_decoder_compiles(precision: DType, weights: WeightLayout, tmp_path: Path) -> None:
    """Its sizes are fixed, so the profile of the request's sizes says nothing to it."""
    vae = load_vae(write_vae(tmp_path / "vae"))
    model = model_spec(latent_shape=(4, 16, 8), precision=precision)
    spec = export_part(vae.part(model, vae.spec(model, tile=8, precision=precision)), precision, tmp_path)
    options = CompilerOptions(profile=PROFILE, targets=TARGETS, weights=weights)
    artefact = TensorRTBackend(TENSORRT_RTX, options).build(tmp_path / "decode.onnx", spec, tmp_path / "engines")
    assert artefact.path.name == "decode.engine"
    assert artefact.path.stat().st_size > 0
    assert (artefact.weights is None) == (weights is WeightLayout.BAKED)


@pytest.mark.parametrize(
    ("precision", "weights"),
    [
        (DType.FLOAT16, WeightLayout.INPUTS),
        pytest.param(DType.FLOAT32, WeightLayout.BAKED, marks=pytest.mark.slow),
        pytest.param(DType.BFLOAT16, WeightLayout.INPUTS, marks=pytest.mark.slow),
    ],
)
def test_a_decoder_that_mixes_frames_compiles(precision: DType, weights: WeightLayout, tmp_path: Path) -> None:
    """Its chunks have any number of frames up to the decoder's own, and any size up to its tile's."""
    vae = load_vae(write_vae(tmp_path / "vae", random_temporal_vae()))
    fixed = model_spec(latent_shape=(4, 5, 8, 8), patch=(1, 1, 1), precision=precision)
    model = replace(fixed, latents=replace(fixed.latents, smallest=(1, 4, 8), largest=(5, 8, 8)))
    spec = export_part(vae.part(model, vae.spec(model, chunk=3, precision=precision)), precision, tmp_path)
    assert spec.inputs[0].shape == (CHUNK, 4, TILE_HEIGHT, 8)
    options = CompilerOptions(profile=PROFILE, targets=TARGETS, weights=weights)
    artefact = TensorRTBackend(TENSORRT_RTX, options).build(tmp_path / "decode.onnx", spec, tmp_path / "engines")
    assert artefact.path.stat().st_size > 0
