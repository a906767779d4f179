"""adacorr-validate: a bundle against the PyTorch model that it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from adacorr_deploy.cli.console import progress_bar, show_lines, show_table
from adacorr_deploy.cli.errors import needs_build_packages, run_app
from adacorr_deploy.cli.model_source import path_from_model
from adacorr_deploy.cli.options import (
    MAX_IMAGES,
    Bundle,
    Eta,
    Guidance,
    Heads,
    Json,
    PromptFile,
    RunBackend,
    SamplerName,
    Scheduler,
    Seed,
    Steps,
    TextEncoder,
    Vae,
    command_app,
    documented,
)

if TYPE_CHECKING:
    from adacorr_deploy.quality.validate import TrajectoryError, Validation

NOT_PASSED: Final = 1  # exit code of a bundle that differs; 2 is for what could not be compared

app = command_app()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    run_app(app, arguments)


@documented(
    app,
    "adacorr-validate demo.bundle --reference demo",
    "adacorr-validate demo.bundle --reference demo --policy robust@2",
    "adacorr-validate my.bundle --reference my-dit/transformer --scheduler my-dit/scheduler --json",
)
def validate(  # noqa: PLR0913, PLR0917  one parameter is one option
    bundle: Bundle,
    reference: Annotated[
        str,
        typer.Option("--reference", metavar="MODEL", help="What the bundle was built from, as for adacorr-build."),
    ],
    scheduler: Scheduler = None,
    heads: Heads = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    steps: Steps = 50,
    guidance: Guidance = 4.0,
    sampler: SamplerName = None,
    eta: Eta = 0.0,
    images: Annotated[
        int, typer.Option("--images", metavar="N", min=1, max=MAX_IMAGES, help="Images sampled together.")
    ] = 2,
    seed: Seed = 0,
    policy: Annotated[
        str, typer.Option("--policy", metavar="NAME|FILE", help="Whose own error is shown beside the engines'.")
    ] = "none",
    prompts: PromptFile = None,
    backend: RunBackend = None,
    as_json: Json = False,
) -> int:
    """Compare a bundle with its PyTorch model: each part alone, then whole runs from the same latents.

    Exit code 0 if everything is within tolerance, 1 if something is not, 2 if they can't be compared.
    """
    from adacorr_deploy.caching.policy import policy_named
    from adacorr_deploy.cli.prompts import prompts_from_file

    chosen = policy_named(policy)
    with needs_build_packages("adacorr-validate"), progress_bar() as advance:
        from adacorr_deploy.exporters import load_checkpoint
        from adacorr_deploy.quality.validate import ValidateOptions, validate_bundle

        options = ValidateOptions(
            steps=steps, guidance=guidance, sampler=sampler, eta=eta, images=images, seed=seed, policy=chosen
        )
        model = path_from_model(reference)
        loaded = load_checkpoint(model, scheduler, heads=heads, vae=vae, text_encoder=text_encoder)
        validation = validate_bundle(
            bundle,
            loaded,
            options,
            advance,
            backend=backend,
            prompts=lambda engine: prompts_from_file(engine, prompts),
        )
    if as_json:
        print(validation.to_json())
    else:
        _show(validation)
    return 0 if validation.passed else NOT_PASSED


def _show(validation: Validation) -> None:
    failed = validation.failed_parts
    show_table(
        ("part", "max_abs", "rel_l2", "verdict"),
        [
            (name, f"{error.max_abs:.1e}", f"{error.rel_l2:.1e}", "differs" if name in failed else "ok")
            for name, error in validation.parts.items()
        ],
    )
    run, asked = validation.trajectory, validation.trajectory.request
    show_lines(
        f"{asked.steps} steps of {asked.sampler.value}, guidance {asked.guidance:g}, from the same latents:",
        f"  against diffusers' own loop      max_abs {run.max_abs:.1e}, rel_l2 {run.rel_l2:.1e}",
        f"  of which the engines' share      rel_l2 {run.engine_rel_l2:.1e}",
        f"  policy {run.policy:<25} {_policy_error(run)}",
        "",
        "passed" if validation.passed else f"NOT passed: {', '.join(failed) or 'the trajectory'}",
    )


def _policy_error(run: TrajectoryError) -> str:
    if run.policy_psnr_db == float("inf"):
        return "identical to the uncached run"
    return f"PSNR {run.policy_psnr_db:.1f} dB against the uncached run"
