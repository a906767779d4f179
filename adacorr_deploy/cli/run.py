"""adacorr-run: sample images from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from adacorr_deploy.cli.clip_options import VideoFormat, clip_options
from adacorr_deploy.cli.console import progress_bar, show_json, show_lines
from adacorr_deploy.cli.errors import run_app
from adacorr_deploy.cli.options import (
    POLICY_NAMES,
    Bundle,
    Eta,
    Guidance,
    Json,
    RunBackend,
    SamplerName,
    Seed,
    Steps,
    command_app,
    documented,
    path_from_text,
)
from adacorr_deploy.cli.run_outputs import Outputs, naming_of, picture_names

if TYPE_CHECKING:
    from adacorr_deploy.runtime.self_test import SelfTestResult

app = command_app()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    run_app(app, arguments)


@documented(
    app,
    "adacorr-run demo.bundle -o images",
    "adacorr-run demo.bundle --class-labels trouser,sneaker,8 --seed 7 -o images",
    "adacorr-run demo.bundle --policy robust@2.5 --trace trace.json -o images",
    "adacorr-run demo.bundle --policy none --latents start.npy --save-latents final.npy -o images",
    "adacorr-run pixart.bundle --prompt 'a red dog' --prompt 'a blue cat' --size 768x512 -o images",
    "adacorr-run demo.bundle --self-test",
)
def run(  # noqa: PLR0913, PLR0917  one parameter is one option
    bundle: Bundle,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            parser=path_from_text,
            help="Folder for one PNG per image (per frame of a clip, in a folder for each) and grid.png; files of the "
            "same names are replaced.",
            show_default=False,
        ),
    ] = None,
    class_labels: Annotated[
        list[str] | None,
        typer.Option(
            "--class-labels",
            metavar="LABELS",
            help="Numbers or names of classes, one image each: 0,3,7 or trouser,8, or the option repeated. "
            "Default: every class, or 8 of them where there are more than 10.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            metavar="TEXT",
            help="What an image shows, of models that take text; repeated for several images.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--negative-prompt",
            metavar="TEXT",
            help="What guidance leads away from: one for all images, or one for each.  Default: the empty text.",
            show_default=False,
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            metavar="FILE.safetensors",
            parser=path_from_text,
            help="In place of prompts, what a text encoder makes of them: tensors prompt_embeddings and prompt_mask, "
            "one row per image, and maybe negative_embeddings and negative_mask.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Pixels of the images, of models that take any.  Default: the model's own.",
            show_default=False,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", metavar="N", help="Of each clip, of models that make clips of any length.", show_default=False
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            "--fps",
            metavar="N",
            help="Frames per second of clips: for models that take it, and in --video.  Default there: 8.",
            show_default=False,
        ),
    ] = None,
    steps: Steps = 50,
    guidance: Guidance = 4.0,
    seed: Seed = 0,
    sampler: SamplerName = None,
    eta: Eta = 0.0,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="NAME|FILE",
            help=f"{POLICY_NAMES} Default: the bundle's own.",
            show_default=False,
        ),
    ] = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            "--latents",
            metavar="IN.npy",
            parser=path_from_text,
            help="Initial latents, float32 (images, channels, height, width), in place of drawn ones.",
            show_default=False,
        ),
    ] = None,
    save_latents: Annotated[
        Path | None,
        typer.Option(
            "--save-latents",
            metavar="OUT.npy",
            parser=path_from_text,
            help="Keep the final latents.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        VideoFormat | None,
        typer.Option(
            "--video", help="Also write each clip as a file that plays. mp4 needs the extra video.", show_default=False
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="T.json",
            parser=path_from_text,
            help="Keep what every block did at every step, and why.",
            show_default=False,
        ),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            metavar="",
            help="First compare the engines with an image that the PyTorch model sampled when the bundle was built, "
            "and stop if they differ. Without an output, nothing else is done.",
        ),
    ] = False,
    backend: RunBackend = None,
    as_json: Json = False,
) -> None:
    """Sample images from a bundle: one PNG for each, and a labelled grid.

    Needs neither PyTorch nor ONNX's own packages.
    """
    from adacorr_deploy.caching.policy import named_file, policy_named
    from adacorr_deploy.cli.image_files import GRID_NAME, Sampled
    from adacorr_deploy.cli.labels import labels_from_text
    from adacorr_deploy.cli.latents_file import latents_from_npy
    from adacorr_deploy.cli.prompts import Asked, pixels_from_text, prompts_asked_for
    from adacorr_deploy.core.samplers import default_sampler
    from adacorr_deploy.runtime import Pipeline, SampleRequest, check_request, sample_with_policy
    from adacorr_deploy.runtime.image_size import latent_size
    from adacorr_deploy.runtime.images import pixels_from_latents
    from adacorr_deploy.runtime.self_test import self_test as test_engines

    outputs = Outputs(directory=output, latents=save_latents, trace=trace)
    if self_test and not outputs.wanted:
        with Pipeline.open(bundle, backend=backend) as pipeline, progress_bar() as advance:
            tested = test_engines(pipeline, advance)
        if as_json:
            show_json(_self_test_document(tested))
        else:
            _show_self_test(tested)
        return
    inputs = [path for path in (latents, embeddings) if path is not None]
    inputs += [named_file(policy)] if policy is not None else []
    outputs.check([GRID_NAME], bundle=bundle, inputs=inputs)
    with Pipeline.open(bundle, backend=backend) as pipeline:
        manifest = pipeline.manifest
        outputs.check_pixels(manifest)
        asked = Asked(prompts=prompt or (), negative=negative_prompt or (), embeddings=embeddings)
        shown = latent_size(manifest, pixels=pixels_from_text(size), frames=frames)
        prompts = prompts_asked_for(pipeline, asked, labels=bool(class_labels), guidance=guidance)
        labels = (
            labels_from_text(
                class_labels or [], num_classes=manifest.model.num_classes, class_names=manifest.class_names
            )
            if prompts is None
            else ()
        )
        images_asked = len(labels if prompts is None else prompts)
        shape = (images_asked, *manifest.model.latents.shape_at(shown))
        request = SampleRequest(
            labels=labels,
            prompts=prompts,
            size=shown,
            frame_rate=fps if manifest.model.conditions.frame_rate else None,  # else of the video alone
            steps=steps,
            guidance=guidance,
            seed=seed,
            sampler=sampler or default_sampler(manifest.schedule),
            eta=eta,
            latents=latents_from_npy(latents, shape) if latents is not None else None,
        )
        check_request(request, manifest.model, manifest.schedule)
        chosen = policy_named(manifest.default_policy if policy is None else policy)
        clips = clip_options(manifest, shown, video=video, frame_rate=fps)
        naming = naming_of(manifest, request, asked.prompts)
        outputs.check(picture_names(naming, clips), bundle=bundle, inputs=inputs)
        with progress_bar() as advance:
            tested_first = test_engines(pipeline, advance) if self_test else None
            result = sample_with_policy(
                pipeline,
                request,
                chosen,
                progress=lambda step, steps, rho: advance(f"{chosen.name}, ρ {rho:.2f}, step", step, steps),
            )
            decoding = outputs.directory is not None and manifest.decoder is not None
            pixels = (
                pipeline.decode(result.latents, progress=advance) if decoding else pixels_from_latents(result.latents)
            )
        pictures = outputs.pictures(
            manifest,
            Sampled(pixels=pixels, naming=naming),
            f"{manifest.model_name}, {chosen.name}, {result.steps} steps, guidance {request.guidance:g}",
            clips,
        )
        outputs.write(pictures, result)
    if as_json:
        show_json(
            {
                "images": [str(path) for path in pictures if path.suffix == ".png" and path.name != GRID_NAME],
                **({"videos": [str(path) for path in pictures if path.suffix != ".png"]} if clips is not None else {}),
                "steps": result.steps,
                "rho": result.rho,
                "launches": result.launches,
                "seconds": result.seconds,
                **(_self_test_document(tested_first) if tested_first is not None else {}),
            }
        )
    else:
        if tested_first is not None:
            _show_self_test(tested_first)
        outputs.show(pictures, chosen, result)


def _self_test_document(tested: SelfTestResult) -> dict[str, object]:
    return {"self_test": asdict(tested)}


def _show_self_test(tested: SelfTestResult) -> None:
    show_lines(
        f"self-test passed with {tested.backend} on {tested.hardware}: {tested.error:.1e} from PyTorch's latents "
        f"(relative L2), allowed is {tested.tolerance:g}; {tested.seconds:.1f} s"
    )
