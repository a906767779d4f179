"""Options that several commands share, each described once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from adacorr_deploy.core.samplers import Sampler

_Command = TypeVar("_Command", bound=Callable[..., int | None])


def command_app() -> typer.Typer:
    """Return an application for a single command."""
    return typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def documented(app: typer.Typer, *lines: str) -> Callable[[_Command], _Command]:
    """Return what makes a function an application's command: its docstring is the help, and `lines` are examples.

    Typer keeps a paragraph's line breaks; here each paragraph is one line, which the terminal's width breaks.
    """

    def register(function: _Command) -> _Command:
        paragraphs = (inspect.getdoc(function) or "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return app.command(help=text, epilog=_examples(*lines))(function)

    return register


def path_from_text(text: str) -> Path:
    """Return a path as it stands on a command line: an empty one is not the working folder."""
    if not text:
        raise typer.BadParameter("it is empty. Give a path.")
    return Path(text)


def _examples(*lines: str) -> str:
    """Return the end of a help page: commands to copy, one a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


# Of --policy: what its value may be.
POLICY_NAMES: Final = (
    "A preset (adacorr-bench --list), one with its knob turned (robust@2.5: a speed-up of 2.5; fora@4: every 4th step "
    "is evaluated), a .json or .toml file, or any of these with AdaCorrection on top (teacache+adacorrection@2, "
    "fora+paper-lazy)."
)
MAX_IMAGES: Final = 1024  # sampled together

Bundle = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="Folder that adacorr-build made.", parser=path_from_text, show_default=False),
]
RunBackend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Engines to run with, in place of those that the bundle was built for: onnxruntime (CPU) and "
        "onnxruntime-cuda open any bundle's ONNX files.",
        show_default=False,
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Denoising steps.")]
Guidance = Annotated[
    float, typer.Option("--guidance", metavar="G", help="Classifier-free guidance, from 1; 1 turns it off.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Same seed and bundle, same images.")]
SamplerName = Annotated[
    Sampler | None,
    typer.Option(
        "--sampler",
        help="ddpm, dpmpp-2m-sde and lcm add noise at each step, the others none. dpmpp-2m (DPM-Solver++ 2M) needs the "
        "fewest steps; flow-euler is for flow-matching models, lcm for those distilled to it.  Default: the model's "
        "own: ddim, flow-euler or lcm.",
        show_default=False,
    ),
]
Eta = Annotated[float, typer.Option("--eta", metavar="E", help="Noise of ddim's steps, from 0 (none) to 1 (ddpm's).")]
Scheduler = Annotated[
    Path | None,
    typer.Option(
        "--scheduler",
        metavar="PATH",
        parser=path_from_text,
        help="A scheduler_config.json or its folder: needed for a bare transformer folder, and elsewhere taken in "
        "place of the model's own.",
        show_default=False,
    ),
]
Vae = Annotated[
    Path | None,
    typer.Option(
        "--vae",
        metavar="PATH",
        parser=path_from_text,
        help="Folder of the VAE (AutoencoderKL, in diffusers' layout) that makes images of latents, in place of the "
        "pipeline's own.",
        show_default=False,
    ),
]
TextEncoder = Annotated[
    Path | None,
    typer.Option(
        "--text-encoder",
        metavar="PATH",
        parser=path_from_text,
        help="Folder of the T5 encoder of prompts (in transformers' layout, its tokenizer in a folder tokenizer beside "
        "it), in place of the pipeline's own.",
        show_default=False,
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        parser=path_from_text,
        help="What the images show, of models that take text: a text file with a prompt a line, or embeddings as "
        ".safetensors; images go round them.  Default: random embeddings.",
        show_default=False,
    ),
]
Heads = Annotated[
    int | None,
    typer.Option(
        "--heads",
        metavar="N",
        min=1,
        max=1024,
        help="Attention heads of an original checkpoint whose size is none of the paper's.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document in place of the table.")]
