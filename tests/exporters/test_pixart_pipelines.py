"""Invariant: a bundle built from a PixArt pipeline's folder samples what diffusers' own pipeline samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file

from adacorr_deploy.cli.build import main
from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters import load_checkpoint
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.quality.metrics import relative_l2
from adacorr_deploy.quality.reference import uncached_latents
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.runtime.example_requests import example_prompts
from tests.exporters.random_pixart import ALPHA_1024, SIGMA_1024, random_pixart
from tests.exporters.random_vae import random_vae, write_vae

STEPS, GUIDANCE = 20, 4.5
# diffusers' pipeline tells a model the image's size if its sample_size is 128.
ALPHA = {**ALPHA_1024, "sample_size": 128}


def write_pipeline(folder: Path, transformer: PixArtTransformer2DModel, pipeline: str) -> Path:
    """Write a pipeline's folder as diffusers does, but for the text encoder: prompts come as embeddings."""
    transformer.save_pretrained(folder / "transformer")
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    write_vae(folder / "vae", random_vae(levels=4))
    index = {
        "_class_name": pipeline,
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def in_diffusers(
    pipeline: PixArtAlphaPipeline | PixArtSigmaPipeline, prompts: Prompts, latents: np.ndarray
) -> np.ndarray:
    """Sample with the whole pipeline of diffusers, from latents of any size to latents."""
    negative = prompts.negative
    assert negative is not None
    repeats = (len(prompts), 1)
    result = pipeline(
        prompt=None,
        negative_prompt=None,
        prompt_embeds=torch.from_numpy(prompts.embeddings),
        prompt_attention_mask=torch.from_numpy(prompts.mask),
        negative_prompt_embeds=torch.from_numpy(np.tile(negative.embeddings, (*repeats, 1))),
        negative_prompt_attention_mask=torch.from_numpy(np.tile(negative.mask, repeats)),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(latents),
        height=8 * latents.shape[2],
        width=8 * latents.shape[3],
        use_resolution_binning=False,
        output_type="latent",
    )
    return result.images.numpy()


@pytest.mark.parametrize(
    ("variant", "kind", "tokens"), [(ALPHA, PixArtAlphaPipeline, 120), (SIGMA_1024, PixArtSigmaPipeline, 300)]
)
def test_twenty_steps_are_those_of_diffusers_own_pipeline_at_any_size(
    variant: dict[str, object],
    kind: type[PixArtAlphaPipeline | PixArtSigmaPipeline],
    tokens: int,
    tmp_path: Path,
) -> None:
    transformer = random_pixart(variant)
    loaded = load_checkpoint(write_pipeline(tmp_path / "pipeline", transformer, kind.__name__))
    bundle = build_bundle(
        loaded, tmp_path / "bundle", OnnxRuntimeBackend(threads=1), BuildOptions(default_policy="none")
    )
    prompt = bundle.manifest.model.conditions.prompt
    assert prompt is not None
    assert prompt.tokens == tokens
    prompts = example_prompts(prompt, range(2))
    parts = {"tokenizer": None, "text_encoder": None, "vae": None}
    pipeline = kind(transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    with Pipeline.open(bundle.path, backend=OnnxRuntimeBackend(threads=1)) as ours:
        for size in [(8, 8), (12, 6)]:
            latents = np.random.default_rng(0).standard_normal((2, 4, *size)).astype(np.float32)
            request = SampleRequest(
                steps=STEPS, guidance=GUIDANCE, sampler=Sampler.DPMPP_2M, prompts=prompts, size=size, latents=latents
            )
            actual = uncached_latents(ours, request, latents, [None] * STEPS)
            assert relative_l2(actual, in_diffusers(pipeline, prompts, latents)) < 1e-3


def test_the_command_builds_a_folder_whose_class_is_the_older_one_and_its_weights_halves(tmp_path: Path) -> None:
    """Released checkpoints are of `Transformer2DModel`, and many of float16: they are built as they are stored."""
    folder = write_pipeline(tmp_path / "pipeline", random_pixart(SIGMA_1024).half(), "PixArtSigmaPipeline")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    older = {"only_cross_attention": False, "double_self_attention": False, "num_vector_embeds": None}
    config |= {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single", **older}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][1] = "Transformer2DModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "-o", str(tmp_path / "bundle"), "--policy", "none", "--no-calibrate", "--precision", "fp16"])
    assert not ended.value.code
    with Pipeline.open(tmp_path / "bundle", backend=OnnxRuntimeBackend(threads=1)) as pipeline:
        assert pipeline.manifest.model.family == "pixart"
        assert pipeline.manifest.model.precision is DType.FLOAT16
        assert pipeline.manifest.decoder is not None
    stored = load_file(tmp_path / "bundle" / "parts" / "block_00.safetensors")
    source = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(stored["bodies.2.net.0.proj.bias"], source["transformer_blocks.0.ff.net.0.proj.bias"])


def test_a_checkpoint_that_lacks_a_weight_or_has_another_models_is_refused(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline", random_pixart(SIGMA_1024), "PixArtSigmaPipeline")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "use_additional_conditions": True}))
    with pytest.raises(CheckpointError, match=r"8 missing: adaln_single.emb.resolution_embedder"):
        load_checkpoint(folder)


def test_the_original_layout_is_refused_with_what_converts_it(tmp_path: Path) -> None:
    of_dit = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight")
    names = (*of_dit, "y_embedder.y_proj.fc1.weight", "blocks.0.scale_shift_table")
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "PixArt-XL-2.pth")
    with pytest.raises(UnsupportedModelError, match="convert_pixart_sigma_to_diffusers"):
        load_checkpoint(tmp_path / "PixArt-XL-2.pth")
