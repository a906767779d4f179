"""adacorr-build: from a checkpoint to a bundle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from adacorr_deploy.cli.compiler_options import compiler_options
from adacorr_deploy.cli.console import progress_bar, show_json, show_lines, show_table
from adacorr_deploy.cli.errors import needs_build_packages, run_app
from adacorr_deploy.cli.inspection import inspect_bundle
from adacorr_deploy.cli.model_source import DEMO
from adacorr_deploy.cli.new_bundle import Source, Target, default_policy, new_bundle, next_steps
from adacorr_deploy.cli.options import (
    Heads,
    Json,
    Scheduler,
    TextEncoder,
    Vae,
    command_app,
    documented,
    path_from_text,
)
from adacorr_deploy.core.engine_build import WeightLayout
from adacorr_deploy.core.specs import HALVES, DType

_COMPILED: Final = "Compiled engines (tensorrt-rtx, tensorrt)"

app = command_app()


class Precision(str, Enum):
    """Of weights and activations; the values are what people call them."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def dtype(self) -> DType:
        return {Precision.FP32: DType.FLOAT32, Precision.FP16: DType.FLOAT16, Precision.BF16: DType.BFLOAT16}[self]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    run_app(app, arguments)


@documented(
    app,
    "adacorr-build demo -o demo.bundle",
    "adacorr-build path/to/DiT-XL-2-256 -o dit-xl.bundle --calibrate",
    "adacorr-build DiT-XL-2-256x256.pt -o dit-xl.bundle --precision fp16 --policy fora",
    "adacorr-build DiT-XL-2-256x256.pt -o xl.bundle --backend tensorrt-rtx --gpu sm_89",
    "adacorr-build --inspect dit-xl.bundle",
    "adacorr-build my-dit/transformer --scheduler my-dit/scheduler -o my.bundle --segment 4",
    "adacorr-build demo -o halves.bundle --halves",
)
def build(  # noqa: PLR0913, PLR0917  one parameter is one option
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="demo (the model that comes with the package), a diffusers pipeline or transformer folder, or a "
            "checkpoint of DiT's or Open-Sora's own code (.pt, .safetensors).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="BUNDLE",
            parser=path_from_text,
            help="Folder of the new bundle.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="NAME",
            help="Engines that will run the bundle: onnxruntime (CPU), onnxruntime-cuda, tensorrt-rtx (compiles "
            "without a GPU too), tensorrt (compiles for the GPU in this machine).",
        ),
    ] = "onnxruntime",
    precision: Annotated[Precision, typer.Option("--precision", help="Of weights and activations.")] = Precision.FP32,
    segment: Annotated[
        int,
        typer.Option(
            "--segment",
            metavar="N",
            min=1,
            max=1000,
            help="Transformer blocks in one engine; caching decides over whole ones.",
        ),
    ] = 1,
    halves: Annotated[
        bool,
        typer.Option(
            "--halves",
            metavar="",
            help="An engine for each unit of a transformer block, of a DiT attention and MLP, so that policies "
            "reuse one without the other.",
        ),
    ] = False,
    scheduler: Scheduler = None,
    heads: Heads = None,
    vae: Vae = None,
    no_vae: Annotated[
        bool, typer.Option("--no-vae", metavar="", help="Leave the VAE out: the bundle gives latents, no images.")
    ] = False,
    text_encoder: TextEncoder = None,
    no_text_encoder: Annotated[
        bool,
        typer.Option(
            "--no-text-encoder",
            metavar="",
            help="Leave the text encoder out: requests give embeddings in place of prompts.",
        ),
    ] = False,
    text_precision: Annotated[
        Precision | None,
        typer.Option(
            "--text-precision",
            help="Of the text encoder: fp32 or bf16, as T5 overflows in fp16.  Default: fp32.",
            show_default=False,
        ),
    ] = None,
    vae_precision: Annotated[
        Precision | None,
        typer.Option(
            "--vae-precision",
            help="Of the VAE.  Default: the model's, but fp32 where the VAE's config asks for it (force_upcast).",
            show_default=False,
        ),
    ] = None,
    vae_tile: Annotated[
        int,
        typer.Option(
            "--vae-tile",
            metavar="N",
            min=8,
            max=4096,
            help="Latent pixels, along a side, that are decoded at once: larger images are decoded in tiles of that "
            "size, whose overlap is blended, and memory stays that of one.",
        ),
    ] = 64,
    vae_chunk: Annotated[
        int | None,
        typer.Option(
            "--vae-chunk",
            metavar="N",
            min=1,
            max=4096,
            help="Frames of a clip that are decoded at once: memory grows with them.  Default: 14, as in diffusers, of "
            "a VAE that mixes frames, and 1 of others.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            help="Preset that adacorr-run takes from this bundle if it is given none (adacorr-bench --list).  "
            "Default: robust, which needs a calibration: --calibrate, or adacorr-calibrate later.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            metavar="",
            help="Measure what skipping costs, for ddim, 50 steps, guidance 4. Default: only for demo in fp32 or fp16; "
            "other runs: adacorr-calibrate.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="SM,…",
            help="GPUs to compile for, as sm_86,sm_89,sm_120 (tensorrt-rtx). Default: all that one engine can serve.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="MIN,OPT,MAX",
            help="Images sampled together: the fewest, those to tune for, the most.  Default: 1,8,16.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(
            "--max-steps",
            metavar="N",
            min=1,
            max=1000,
            help="Most denoising steps.  Default: 100.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    height: Annotated[
        str | None,
        typer.Option(
            "--height",
            metavar="MIN,OPT,MAX",
            help="Latent pixels from top to bottom, of models that take any: smallest, tuned for, largest.  "
            "Default: the model's own alone.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    width: Annotated[
        str | None,
        typer.Option(
            "--width",
            metavar="MIN,OPT,MAX",
            help="Latent pixels from left to right, of models that take any: smallest, tuned for, largest.  "
            "Default: the model's own alone.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    frames: Annotated[
        str | None,
        typer.Option(
            "--frames",
            metavar="MIN,OPT,MAX",
            help="Latent frames of a clip, of models that take any: smallest, tuned for, largest.  "
            "Default: the model's own alone.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    weights: Annotated[
        WeightLayout | None,
        typer.Option(
            "--weights",
            help="baked: in the engines, one for each part. inputs: beside them, and parts of one structure share an "
            "engine, which builds and loads once.  Default: baked.",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            metavar="",
            help="Let later releases open the engines (tensorrt).",
            rich_help_panel=_COMPILED,
        ),
    ] = False,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            metavar="FILE",
            parser=path_from_text,
            help="Keeps tunings from one build to the next (tensorrt).",
            show_default=False,
            rich_help_panel=_COMPILED,
        ),
    ] = None,
    inspect: Annotated[
        Path | None,
        typer.Option(
            "--inspect",
            metavar="BUNDLE",
            parser=path_from_text,
            help="Build nothing: show what a bundle holds and what its build took.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the bundle that stands at BUNDLE.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a Diffusion Transformer, compile its parts, and store them as a bundle.

    The bundle appears whole or not at all: a build that fails or is interrupted leaves nothing behind, and the next one
    starts anew.
    """
    if inspect is not None:
        if model is not None or output is not None:
            raise typer.BadParameter("it builds nothing, so it takes no MODEL and no --output.", param_hint="--inspect")
        inspect_bundle(inspect, as_json=as_json)
        return
    if vae is not None and no_vae:
        raise typer.BadParameter("it names a VAE, and --no-vae leaves it out. Give one of them.", param_hint="--vae")
    if text_encoder is not None and no_text_encoder:
        raise typer.BadParameter(
            "it names a text encoder, and --no-text-encoder leaves it out. Give one of them.",
            param_hint="--text-encoder",
        )
    if model is None:
        raise typer.BadParameter("it is missing. Give demo, or a path.", param_hint="MODEL")
    if output is None:
        raise typer.BadParameter("it is missing. Give a folder for the new bundle.", param_hint="--output")
    if halves and segment != 1:
        raise typer.BadParameter("an engine holds a half of a block, or a --segment of them.", param_hint="--halves")
    calibrated = model == DEMO and precision is not Precision.BF16 if calibrate is None else calibrate
    compiler = compiler_options(
        gpu,
        batch,
        max_steps,
        weights,
        version_compatible,
        timing_cache,
        {"frames": frames, "height": height, "width": width},
    )
    chosen = default_policy(policy, calibrated=calibrated)
    started = time.perf_counter()
    with needs_build_packages("adacorr-build"), progress_bar() as advance:
        from adacorr_deploy.exporters.bundle_builder import BuildOptions

        options = BuildOptions(
            precision=precision.dtype,
            segment=HALVES if halves else segment,
            overwrite=overwrite,
            default_policy=chosen,
            vae_tile=vae_tile,
            vae_chunk=vae_chunk,
            vae_precision=vae_precision.dtype if vae_precision is not None else None,
            text_precision=text_precision.dtype if text_precision is not None else None,
        )
        source = Source(
            model=model,
            scheduler=scheduler,
            heads=heads,
            vae=vae,
            with_vae=not no_vae,
            text_encoder=text_encoder,
            with_text_encoder=not no_text_encoder,
        )
        target = Target(bundle=output, backend=backend, compiler=compiler, options=options, calibrated=calibrated)
        bundle = new_bundle(source, target, advance)
    seconds = time.perf_counter() - started
    parts = len(bundle.manifest.parts)
    size_bytes = sum(record.size_bytes for record in bundle.manifest.files.values())
    if as_json:
        show_json(
            {
                "bundle": str(bundle.path),
                "model": bundle.manifest.model_name,
                "backend": bundle.manifest.backend,
                "precision": precision.value,
                "parts": parts,
                "bytes": size_bytes,
                "seconds": seconds,
            }
        )
        return
    show_table(
        ("model", "backend", "precision", "parts", "MB", "seconds"),
        [(bundle.manifest.model_name, backend, precision.value, parts, f"{size_bytes / 1e6:.1f}", f"{seconds:.1f}")],
    )
    show_lines(f"{bundle.path}", *next_steps(bundle, calibrated=calibrated))
