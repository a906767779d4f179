"""Options that several commands share, each described once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adacorr_deploy.core.samplers import Sampler


def command_app() -> typer.Typer:
    """Return an application for a single command."""
    return typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def examples(*lines: str) -> str:
    """Return the end of a help page: commands to copy, one a line."""
    return "\n\n".join(["[bold]Examples[/bold]", *lines])


Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that adacorr-build made.", show_default=False)]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Denoising steps.")]
Guidance = Annotated[
    float, typer.Option("--guidance", metavar="G", help="Classifier-free guidance, from 1; 1 turns it off.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Same seed and bundle, same images.")]
SamplerName = Annotated[Sampler, typer.Option("--sampler", help="ddpm adds noise at each step; ddim adds none.")]
Scheduler = Annotated[
    Path | None,
    typer.Option(
        "--scheduler",
        metavar="PATH",
        help="A scheduler_config.json or its folder: needed for a bare transformer folder, and elsewhere taken in "
        "place of the model's own.",
        show_default=False,
    ),
]
Heads = Annotated[
    int | None,
    typer.Option(
        "--heads",
        metavar="N",
        min=1,
        help="Attention heads of an original checkpoint whose size is none of the paper's.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document in place of the table.")]
