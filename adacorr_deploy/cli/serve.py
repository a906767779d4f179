"""adacorr-serve: from a bundle to a Triton model repository."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from adacorr_deploy.cli.console import say, show_json, show_lines
from adacorr_deploy.cli.errors import run_app
from adacorr_deploy.cli.options import Bundle, Json, command_app, documented, path_from_text

if TYPE_CHECKING:
    from adacorr_deploy.serving.settings import Limits

app = command_app()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    run_app(app, arguments)


@documented(
    app,
    "adacorr-serve demo.bundle -o models",
    "adacorr-serve demo.bundle -o models --overwrite --run",
    "adacorr-serve xl.bundle -o models --name dit-xl --balanced robust@1.8 --fast robust@2.5",
    "adacorr-serve my.bundle -o models --policy-file careful.toml --max-queue 256 --batch-rows 2,8,32",
)
def serve(  # noqa: PLR0913, PLR0917  one parameter is one option
    bundle: Bundle,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="REPO",
            parser=path_from_text,
            help="Folder of the new model repository.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Of the served model. Default: the bundle's.", show_default=False),
    ] = None,
    exact: Annotated[
        str | None, typer.Option("--exact", metavar="POLICY", help="Of quality exact.  Default: none.")
    ] = None,
    balanced: Annotated[
        str | None,
        typer.Option(
            "--balanced",
            metavar="POLICY",
            help="Of quality balanced, and of requests that don't say.  Default: robust, or fora@2 where the bundle "
            "has no calibration.",
        ),
    ] = None,
    fast: Annotated[
        str | None,
        typer.Option("--fast", metavar="POLICY", help="Of quality fast.  Default: robust@3, or fora@3."),
    ] = None,
    policy_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--policy-file",
            metavar="FILE",
            parser=path_from_text,
            help="A .json or .toml policy that requests may name, as its file is called; may be repeated.",
            show_default=False,
        ),
    ] = None,
    max_images: Annotated[int, typer.Option("--max-images", metavar="N", min=1, max=4096, help="Of one request.")] = 16,
    max_queue: Annotated[
        int,
        typer.Option("--max-queue", metavar="N", min=1, max=100_000, help="Requests that wait; one more is refused."),
    ] = 64,
    batch_rows: Annotated[
        str | None,
        typer.Option(
            "--batch-rows",
            metavar="N,…",
            help="Sizes of the launches that requests share; an image with guidance is two rows.  "
            "Default: 1,2,4,6,8,12,16,24.",
            show_default=False,
        ),
    ] = None,
    lanes: Annotated[
        int | None,
        typer.Option(
            "--lanes",
            metavar="N",
            min=1,
            max=256,
            help="On a CPU, requests served side by side, each with its share of the cores; 1 gives one request all "
            "of them.  Default: one per core.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the repository that stands at REPO.")
    ] = False,
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            metavar="",
            help="Then start a Triton server on this machine's CPU, until Ctrl-C: one on PATH, or what "
            "tools/serving/install_triton.sh installed.",
        ),
    ] = False,
    http_port: Annotated[
        int, typer.Option("--http-port", metavar="N", min=1, max=65533, help="With --run; gRPC and metrics follow it.")
    ] = 8000,
    as_json: Json = False,
) -> None:
    """Write a Triton model repository: configurations, the bundle, and the runtime that samples from it.

    It also holds a Dockerfile, pinned requirements, a client, a health check and a Grafana dashboard. The repository
    appears whole or not at all.
    """
    from adacorr_deploy.serving.local_server import Ports, installed_triton, run_server
    from adacorr_deploy.serving.repository import RepositoryOptions, write_repository
    from adacorr_deploy.serving.settings import Quality

    triton = installed_triton() if run else None
    given = {Quality.EXACT: exact, Quality.BALANCED: balanced, Quality.FAST: fast}
    options = RepositoryOptions(
        name=name,
        overwrite=overwrite,
        limits=_limits(max_images, max_queue, lanes, batch_rows),
        quality={tier: policy for tier, policy in given.items() if policy is not None},
        policy_files=tuple(policy_file or ()),
    )
    repository = write_repository(bundle, output, options)
    tiers = {tier.value: policy for tier, policy in repository.settings.quality.items()}
    if triton is not None:
        say(f"{output}: serving {repository.model} on ports {http_port} (HTTP), {http_port + 1} (gRPC); Ctrl-C ends it")
        client = shlex.quote(str(output / "client.py"))
        say(f"ask it from elsewhere: python {client} --server localhost:{http_port + 1} {repository.asked}")
        raise typer.Exit(run_server(triton, repository.path, Ports.from_first(http_port)))
    if as_json:
        show_json({"repository": str(output), "model": repository.model, "quality": tiers})
        return
    show_lines(
        f"{output}: model {repository.model}; " + ", ".join(f"{tier} = {policy}" for tier, policy in tiers.items()),
        f"Serve it: docker build -t {repository.model} {output}, or add --overwrite --run; see {output}/README.md",
    )


def _limits(max_images: int, max_queue: int, lanes: int | None, batch_rows: str | None) -> Limits:
    from adacorr_deploy.serving.settings import Limits

    limits = Limits(max_images=max_images, max_queue=max_queue, lanes=lanes)
    return limits if batch_rows is None else limits.model_copy(update={"batch_rows": _sizes(batch_rows)})


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers.", param_hint="--batch-rows") from error
    if not all(1 <= size <= 4096 for size in sizes) or list(sizes) != sorted(set(sizes)) or len(sizes) > 16:
        raise typer.BadParameter(
            f"{text!r}: allowed are up to 16 sizes from 1 to 4096, each larger than the one before.",
            param_hint="--batch-rows",
        )
    return sizes
