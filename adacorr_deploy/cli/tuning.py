"""The part of adacorr-calibrate that searches: from a target to a policy file and the Pareto front."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.cli.console import Advance, Cell, show_json, show_lines, show_table
from adacorr_deploy.core.errors import CalibrationError

if TYPE_CHECKING:
    from adacorr_deploy.cli.calibrate import Engines
    from adacorr_deploy.quality.calibrate import CalibrationOptions
    from adacorr_deploy.quality.tune import Tuned, TunedPoint
    from adacorr_deploy.quality.tune_search import Target
    from adacorr_deploy.runtime import Pipeline, SampleRequest

_COLUMNS = ("policy", "speedup", "measured_speedup", "rho", "psnr_db", "psnr_worst_db", "images", "front")


def tune_bundle(
    bundle: Path,
    names: Sequence[str] | None,
    target: Target,
    options: CalibrationOptions,
    advance: Advance,
    engines: Engines,
) -> Tuned:
    """Measure what the policies look up and the bundle does not hold, then search them.

    Args:
        bundle: Calibrations are stored in it.
        names: Presets with a knob, alone or with `+adacorrection`; None: all that fit the bundle.
        target: What is asked for.
        options: For which runs.
        advance: Told of every step.
        engines: In place of the bundle's own, and the prompts to measure on.

    Raises:
        AdaCorrError: As `calibrate_policies` and `tune`.
    """
    from adacorr_deploy.cli.prompts import opened_with_prompts
    from adacorr_deploy.core.samplers import quiet_samplers
    from adacorr_deploy.quality.policy_calibration import calibrate_policies
    from adacorr_deploy.quality.tune import TuneOptions, families_that_fit, tune
    from adacorr_deploy.runtime import SampleRequest
    from adacorr_deploy.runtime.example_requests import example_request

    with opened_with_prompts(bundle, engines.backend, engines.prompts) as pipeline:
        sampler = options.sampler or quiet_samplers(pipeline.manifest.schedule)[0]
        request = SampleRequest((0,), steps=options.steps, guidance=options.guidance, sampler=sampler)
        request = example_request(pipeline.manifest.model, request, (0,))
        families = tuple(names) if names is not None else families_that_fit(pipeline, request)
        chosen = TuneOptions(
            target=target,
            families=families,
            sampler=sampler,
            steps=options.steps,
            guidance=options.guidance,
            images=options.images,
        )
        missing = [name for name in families if _lacks_measurements(pipeline, request, name)]
        if missing:
            calibrate_policies(pipeline, [policy_named(name) for name in missing], options, advance)
    with opened_with_prompts(bundle, engines.backend, engines.prompts) as pipeline:
        return tune(pipeline, chosen, advance)


def _lacks_measurements(pipeline: Pipeline, request: SampleRequest, name: str) -> bool:
    from adacorr_deploy.runtime import controller_for_request

    try:
        controller_for_request(pipeline, request, policy_named(name))
    except CalibrationError:
        return True
    return False


def show_tuned(tuned: Tuned, files: Sequence[Path], *, as_json: bool) -> None:
    """Show what was found: one JSON document, or the table of the last round's policies."""
    if as_json:
        show_json(tuned_document(tuned))
        return
    rows = [_row(tuned, point) for point in sorted(tuned.table, key=lambda point: -point.speedup)]
    show_table(_COLUMNS, [[row[name] for name in _COLUMNS] for row in rows])
    chosen = tuned.chosen
    verdict = "meets the target best" if tuned.meets_target else "comes nearest; none meets the target"
    show_lines(f"{chosen.policy.name} {verdict}", *(f"wrote {path}" for path in files))


def tuned_document(tuned: Tuned) -> dict[str, object]:
    """Return the results as a JSON document: the policy chosen, and the rows, of which those of the front say so."""
    return {
        "chosen": tuned.chosen.policy.name,
        "meets_target": tuned.meets_target,
        "policy": json.loads(tuned.chosen.policy.model_dump_json(by_alias=True)),
        "rows": [_row(tuned, point) for point in tuned.table],
    }


def policy_file(tuned: Tuned) -> bytes:
    """Return the chosen policy as a file that `--policy` takes."""
    return (tuned.chosen.policy.model_dump_json(by_alias=True, indent=1, exclude_none=True) + "\n").encode()


def _row(tuned: Tuned, point: TunedPoint) -> dict[str, Cell]:
    timed = next((each for each in tuned.front if each.policy == point.policy), None)
    return {
        "policy": point.policy.name,
        "speedup": point.speedup,
        "measured_speedup": timed.measured_speedup if timed is not None else None,
        "rho": point.rho,
        "psnr_db": point.psnr_db if math.isfinite(point.psnr_db) else None,
        "psnr_worst_db": point.psnr_worst_db if math.isfinite(point.psnr_worst_db) else None,
        "images": point.images,
        "front": "yes" if timed is not None else "no",
    }
