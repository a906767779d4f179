"""adacorr-calibrate: measure a bundle's runs, so that policies know what skipping costs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from adacorr_deploy.caching.policy import DEFAULT_POLICY, PRESETS, policy_named
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.cli.console import Advance, progress_bar, show_json, show_lines
from adacorr_deploy.cli.errors import run_app
from adacorr_deploy.cli.options import (
    MAX_IMAGES,
    Bundle,
    Guidance,
    Json,
    PromptFile,
    RunBackend,
    SamplerName,
    Steps,
    command_app,
    documented,
    path_from_text,
)
from adacorr_deploy.core.errors import RequestError

if TYPE_CHECKING:
    from adacorr_deploy.caching.calibration import CalibrationKey
    from adacorr_deploy.quality.calibrate import CalibrationOptions
    from adacorr_deploy.quality.tune_search import Target

_PREDICTOR: Final = PRESETS[DEFAULT_POLICY].predictor

app = command_app()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit."""
    run_app(app, arguments)


@documented(
    app,
    "adacorr-calibrate demo.bundle",
    "adacorr-calibrate demo.bundle --steps 30 --guidance 1.5",
    "adacorr-calibrate demo.bundle --predictor gated-taylor --order 2",
    "adacorr-calibrate demo.bundle --policies teacache,fbcache+adacorrection",
    "adacorr-calibrate demo.bundle --target-speedup 2 -o policy.json",
)
def calibrate(  # noqa: PLR0913, PLR0917  one parameter is one option
    bundle: Bundle,
    steps: Steps = 50,
    guidance: Guidance = 4.0,
    sampler: SamplerName = None,
    images: Annotated[
        int, typer.Option("--images", metavar="N", min=1, max=MAX_IMAGES, help="Images to measure on.")
    ] = 16,
    policies: Annotated[
        str | None,
        typer.Option(
            "--policies",
            metavar="NAMES",
            help="Measure all that these policies look up, and nothing else: names with commas between them.",
            show_default=False,
        ),
    ] = None,
    predictor: Annotated[
        PredictorKind | None,
        typer.Option(
            "--predictor",
            help=f"Stands for a skipped block; the policy's must be the same.  Default: {_PREDICTOR.kind.value}.",
            show_default=False,
        ),
    ] = None,
    order: Annotated[
        int | None,
        typer.Option(
            "--order",
            metavar="1|2",
            min=1,
            max=2,
            help=f"Of a predictor that extrapolates.  Default: {_PREDICTOR.order}.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        Revision | None,
        typer.Option(
            "--revision",
            help="How skipped steps are taken again once the next evaluation is known; the policy's must be the same.  "
            f"Default: {_PREDICTOR.revision.value} without --predictor, none with it.",
            show_default=False,
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            "--target-speedup",
            metavar="X",
            help="Search the policies for the best quality at this speed-up, and write the one found to -o.",
            show_default=False,
        ),
    ] = None,
    target_psnr: Annotated[
        float | None,
        typer.Option(
            "--target-psnr",
            metavar="DB",
            help="Search them for the highest speed-up at this PSNR against the uncached images.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", parser=path_from_text, help="Policy file found.", show_default=False
        ),
    ] = None,
    front: Annotated[
        Path | None,
        typer.Option(
            "--front", metavar="FILE", parser=path_from_text, help="JSON of the Pareto front.", show_default=False
        ),
    ] = None,
    prompts: PromptFile = None,
    backend: RunBackend = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle's runs, so that policies know what skipping costs (adacorr-bench --list: which need it).

    A calibration holds for one sampler, number of steps, guidance and predictor, at the model's own size; it stands in
    the bundle and takes the place of an earlier one for the same. Measuring again gives the same calibration. An
    interrupted run goes on where it was when it is started again.

    With a target, what the policies look up is measured where the bundle does not hold it yet; then their settings are
    searched on images of their own.
    """
    from adacorr_deploy.quality.calibrate import CalibrationOptions

    target = _target(target_speedup, target_psnr, output, front)
    if (policies is not None or target is not None) and any((predictor, order, revision)):
        raise RequestError(
            "--predictor, --order and --revision are of one calibration; --policies and a target measure what policies "
            "look up, each for its own predictor. Leave --predictor, --order and --revision out."
        )
    options = CalibrationOptions(
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        images=images,
        predictor=_predictor(predictor, order, revision),
    )
    if target is not None:
        engines = Engines(backend=backend, prompts=prompts)
        _tune(bundle, policies, target, options, Outputs(policy=output, front=front), engines, as_json=as_json)
        return
    started = time.perf_counter()
    with progress_bar() as advance:
        if policies is None:
            stored = [calibrate_bundle(bundle, options, advance, backend=backend, prompts=prompts)]
        else:
            stored = calibrate_for_policies(
                bundle, _names(policies), options, advance, backend=backend, prompts=prompts
            )
    seconds = time.perf_counter() - started
    if as_json:
        files: dict[str, object] = (
            {"calibration": str(stored[0][0])} if policies is None else {"files": [str(path) for path, _ in stored]}
        )
        show_json({**files, "steps": steps, "guidance": guidance, "seconds": seconds})
    else:
        for number, (path, key) in enumerate(stored, start=1):
            took = f", in {seconds:.1f} s" if number == len(stored) else ""
            show_lines(f"{path}: {key.sampler}, {steps} steps, guidance {guidance:g}{took}")


def _predictor(kind: PredictorKind | None, order: int | None, revision: Revision | None) -> Predictor:
    usual = _PREDICTOR.revision if kind is None else Revision.NONE
    return Predictor(kind=kind or _PREDICTOR.kind, order=order or _PREDICTOR.order, revision=revision or usual)


def _names(policies: str) -> list[str]:
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise RequestError("--policies is empty. Give at least one name; adacorr-bench --list shows them.")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Files that a search writes."""

    policy: Path | None
    front: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What measures, and on what."""

    backend: str | None
    prompts: Path | None


def _target(speedup: float | None, psnr_db: float | None, output: Path | None, front: Path | None) -> Target | None:
    from adacorr_deploy.quality.tune_search import Target

    if speedup is not None and psnr_db is not None:
        raise RequestError("--target-speedup and --target-psnr are two targets. Give one of them.")
    if speedup is None and psnr_db is None:
        if output is not None or front is not None:
            raise RequestError("-o and --front are what a search writes. Give --target-speedup or --target-psnr too.")
        return None
    return Target(speedup=speedup, psnr_db=psnr_db)


def _tune(
    bundle: Path,
    policies: str | None,
    target: Target,
    options: CalibrationOptions,
    outputs: Outputs,
    engines: Engines,
    *,
    as_json: bool,
) -> None:
    from adacorr_deploy.cli.output_files import check_outputs, write_files
    from adacorr_deploy.cli.tuning import policy_file, show_tuned, tune_bundle, tuned_document

    names = None if policies is None else _names(policies)
    wanted = [path for path in (outputs.policy, outputs.front) if path is not None]
    check_outputs(wanted, bundle=bundle)
    with progress_bar() as advance:
        tuned = tune_bundle(bundle, names, target, options, advance, engines)
    files: dict[Path, bytes] = {}
    if outputs.policy is not None:
        files[outputs.policy] = policy_file(tuned)
    if outputs.front is not None:
        files[outputs.front] = (json.dumps(tuned_document(tuned), indent=1) + "\n").encode()
    write_files(files)
    show_tuned(tuned, wanted, as_json=as_json)


def calibrate_bundle(
    bundle: Path,
    options: CalibrationOptions,
    advance: Advance,
    *,
    backend: str | None = None,
    prompts: Path | None = None,
) -> tuple[Path, CalibrationKey]:
    """Calibrate a bundle on disk, store the result in it, and return where and for what; `adacorr-build` does so too.

    What an interrupted calibration for the same has measured is taken up.

    Raises:
        RequestError: If an option is out of range.
        CalibrationError: If the sampler can't be calibrated.
        BundleError: If the bundle is altered or can't be written.
    """
    from adacorr_deploy.cli.prompts import opened_with_prompts
    from adacorr_deploy.quality.policy_calibration import store_calibration

    with opened_with_prompts(bundle, backend, prompts) as pipeline:
        return store_calibration(pipeline, options, advance)


def calibrate_for_policies(
    bundle: Path,
    names: Sequence[str],
    options: CalibrationOptions,
    advance: Advance,
    *,
    backend: str | None = None,
    prompts: Path | None = None,
) -> list[tuple[Path, CalibrationKey]]:
    """Measure what policies look up, store it in a bundle on disk, and return where and for what, as above.

    Raises:
        AdaCorrError: As `calibrate_policies`.
    """
    from adacorr_deploy.cli.prompts import opened_with_prompts
    from adacorr_deploy.quality.policy_calibration import calibrate_policies

    chosen = [policy_named(name) for name in names]
    with opened_with_prompts(bundle, backend, prompts) as pipeline:
        return calibrate_policies(pipeline, chosen, options, advance)
