"""The same decisions as published code that comes in no package: it was run, and what it saw and decided was recorded.

`tools/references/record.py` runs the authors' own functions at the commit that a fixture names, and keeps signals and
decisions alone. Where ours differ by design, a test says in what.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import pytest
from _pytest.mark import ParameterSet

from adacorr_deploy.caching.decisions import Kept, Observation, Observed, Signals
from adacorr_deploy.caching.gates.thresholds import FastCacheGate
from adacorr_deploy.caching.guards import Guards
from adacorr_deploy.caching.policy import PRESETS, policy_named
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.profile import ChangePolynomial
from tests.caching.driven import Driven, Source, change, drive, made
from tests.caching.scripted_profile import profile

FIXTURES: Final = Path(__file__).parent / "references"
Fixture = dict[str, Any]  # JSON


def runs(name: str) -> list[Fixture]:
    found: list[Fixture] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    return found


def every_run(name: str, **only: str) -> list[ParameterSet]:
    """Return a fixture's runs of these settings, each with its place in the file and its settings as id."""
    return [
        pytest.param(run, id=f"{index}-" + "-".join(f"{key}={value}" for key, value in named(run).items()))
        for index, run in enumerate(runs(name))
        if only.items() <= named(run).items()
    ]


def named(run: Fixture) -> Fixture:
    return {key: value for key, value in run["settings"].items() if not isinstance(value, list)}


def l1(pair: list[float] | None) -> list[Signals]:
    """Signals of one image whose recorded mean|x − x̄| and mean|x̄| are these; null is asked of by ours alone."""
    moved, before = pair or (0.1, 1.0)
    return [change(moved / before, norm=before)]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_each_fixture_says_what_it_was_recorded_of(path: Path) -> None:
    source = json.loads(path.read_text(encoding="utf-8"))["source"]
    assert set(source) == {"repository", "commit", "file", "definitions", "licence"}
    assert len(source["commit"]) == 40
    assert source["definitions"]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_each_fixture_decides_both_ways_in_most_runs(path: Path) -> None:
    """A recording in which everything is evaluated, or nothing but the first step, would show little."""

    def decides(evaluated: list[Any], steps: int) -> bool:
        return 1 < len([each for each in evaluated if each != []]) < steps or isinstance(evaluated[0], list)

    telling = [
        any(decides(each, run["settings"]["steps"]) for each in evaluated_by_kind(run).values())
        for run in runs(path.stem)
    ]
    assert sum(telling) > len(telling) / 2


def evaluated_by_kind(run: Fixture) -> dict[str, list[Any]]:
    evaluated = run["evaluated"]
    return evaluated if isinstance(evaluated, dict) else {"": evaluated}


@pytest.mark.parametrize("run", every_run("teacache"))
def test_teacache_evaluates_where_the_authors_forward_does(run: Fixture) -> None:
    settings = run["settings"]
    polynomial = ChangePolynomial(coefficients=tuple(settings["coefficients"]), low=0.0, high=10.0)
    measured = profile(steps=settings["steps"]).model_copy(update={"output_change": polynomial})
    controller = made(policy_named(f"teacache@{settings['threshold']}"), steps=settings["steps"], profile=measured)
    found = drive(controller, settings["steps"], signals=lambda step, _: l1(run["changes"][step]))
    assert found.evaluated() == run["evaluated"]


def test_teacache_clamps_its_polynomial_where_the_authors_goes_on() -> None:
    """Theirs has no range: of a change larger than any fitted one it may be negative, and takes from the sum."""
    latte = (-2.46434137e03, 3.08044764e02, 8.07447667e01, -4.11385132e00, 1.11001402e-01)  # from the same repository
    ours = ChangePolynomial(coefficients=latte, low=0.0, high=0.1)
    assert sum(c * 0.3**power for power, c in zip((4, 3, 2, 1, 0), latte, strict=True)) < 0
    assert ours.at(0.3) == ours.at(0.1) > 0


@pytest.mark.parametrize("run", every_run("adacache"))
def test_adacache_evaluates_where_the_authors_block_does(run: Fixture) -> None:
    """On the same distances; published they are of one attention in the middle, here of what a span keeps."""
    steps, base = run["settings"]["steps"], PRESETS["adacache"]
    codebook = tuple((limit, int(rate)) for limit, rate in run["settings"]["codebook"])
    policy = base.model_copy(update={"gate": base.gate.model_copy(update={"codebook": codebook})})
    found = drive(made(policy, steps=steps), steps, changes=lambda step, _: l1(run["changes"][step]))
    assert found.evaluated() == run["evaluated"]


def easycache(run: Fixture, *, present_norm: bool) -> Driven:
    """Decide with the gain relative to ‖v‖ of the present evaluation, as published, or to that before, as ours is."""
    settings = run["settings"]
    guards = Guards(warmup_steps=settings["warmup"], final_steps=1, max_age_steps=1000)
    policy = policy_named(f"easycache@{settings['threshold']}").model_copy(update={"guards": guards})

    def output_change(step: int, _: int) -> list[Signals]:
        moved, before, now = run["output_changes"][step] or (0.1, 1.0, 1.0)
        return l1([moved, now if present_norm else before])

    return drive(
        made(policy, steps=settings["steps"]),
        settings["steps"],
        signals=lambda step, _: l1(run["changes"][step]),
        changes=output_change,
    )


def first_difference(ours: list[int], theirs: list[int]) -> int:
    """Return by how many steps ours evaluates later than theirs where the two first differ; 0 if they don't."""
    return next((one - other for one, other in zip(ours, theirs, strict=False) if one != other), 0)


@pytest.mark.parametrize("run", every_run("easycache", path="straight"))
def test_easycache_evaluates_where_the_authors_forward_does(run: Fixture) -> None:
    assert easycache(run, present_norm=True).evaluated() == run["evaluated"]


@pytest.mark.parametrize("run", every_run("easycache", path="wandering"))
def test_easycache_measures_its_gain_over_the_way_and_the_authors_over_its_ends(run: Fixture) -> None:
    """So ours is no larger, and evaluates later where the two differ."""
    assert first_difference(easycache(run, present_norm=True).evaluated(), run["evaluated"]) > 0


def test_easycache_knows_the_outputs_norm_one_evaluation_late() -> None:
    """While the output grows, as it does here, ours takes a change for more than theirs does, and evaluates earlier."""
    differences = [
        first_difference(easycache(run, present_norm=False).evaluated(), run["evaluated"])
        for run in runs("easycache")
        if run["settings"]["path"] == "straight"
    ]
    assert max(differences) == 0
    assert min(differences) < 0


@pytest.mark.parametrize("run", every_run("smoothcache"))
def test_smoothcache_evaluates_what_the_authors_schedule_does(run: Fixture) -> None:
    settings = run["settings"]
    tables = {
        kind: tuple(tuple(math.inf if error is None else error for error in row) for row in table)
        for kind, table in run["errors"].items()
    }
    measured = profile(steps=settings["steps"], parts=4).model_copy(
        update={"unit_errors": {"attention": tables["attn"], "mlp": tables["mlp"]}}
    )
    base = PRESETS["smoothcache"]
    gate = base.gate.model_copy(update={name: settings[name] for name in ("alpha", "max_skipped")})
    controller = made(
        base.model_copy(update={"gate": gate}), steps=settings["steps"], blocks=4, profile=measured, halves=True
    )
    found = drive(controller, settings["steps"])
    for half in range(4):
        assert found.evaluated(half) == run["evaluated"]["attn" if half % 2 == 0 else "mlp"]


@pytest.mark.parametrize("run", every_run("learning_to_cache"))
def test_l2c_evaluates_what_the_authors_model_does(run: Fixture, tmp_path: Path) -> None:
    """Their router i belongs to step S − 1 − i, and those of odd i are not asked: such steps are evaluated whole."""
    settings, halves = run["settings"], len(run["scores"][0])
    rows = [scores if index % 2 == 0 else [1.0] * halves for index, scores in enumerate(run["scores"])][::-1]
    file = tmp_path / "router.json"
    file.write_text(json.dumps({"scores": rows, "threshold": settings["threshold"]}), encoding="utf-8")
    controller = made(policy_named(f"l2c@{file}"), steps=settings["steps"], blocks=halves, halves=True)
    found = drive(controller, settings["steps"])
    by_step = [[half for half in range(halves) if step in found.evaluated(half)] for step in range(settings["steps"])]
    assert by_step == run["evaluated"]


@pytest.mark.parametrize("run", every_run("lazydit"))
def test_lazydit_reuses_where_the_authors_gates_are_open(run: Fixture) -> None:
    """Theirs reuses below ½ of a sum over tokens: ours above it, of the mean, with weights of the other sign.

    The profile holds one gate for all steps of a part; theirs are trained for each. The decision is the same of either.
    """
    settings = run["settings"]

    def probe(step: int, half: int) -> list[Signals]:
        unit = ("attn", "mlp")[half]
        pairs = zip(run["weights"][unit][step], run["modulated"][unit][step], strict=True)
        return [change(0.1, probe=-settings["tokens"] * sum(weight * mean for weight, mean in pairs))]

    controller = made(
        policy_named(f"lazydit@{settings['threshold']}"),
        steps=settings["steps"],
        profile=profile(steps=settings["steps"]),
        halves=True,
    )
    found = drive(controller, settings["steps"], signals=probe)
    assert {unit: found.evaluated(half) for half, unit in enumerate(("attn", "mlp"))} == run["evaluated"]


def fastcache(run: Fixture, signals: Source) -> Driven:
    """Decide with the limit that the authors' code comes to.

    It takes the larger of its ratio threshold and of min(√(χ²/ND), 0.01 + δ/2), and the second is passed by δ ≤ 0.02
    alone: χ² decides nothing. Ours is s·√(χ²/ND).
    """
    settings = run["settings"]
    limit = max(settings["threshold"], 0.02)
    scale = limit / FastCacheGate(scale=1.0).limit(settings["elements"])
    policy: Policy = policy_named(f"fastcache@{scale}")
    controller = made(
        policy, steps=settings["steps"], profile=profile(steps=settings["steps"]), elements=settings["elements"]
    )
    return drive(controller, settings["steps"], signals=signals)


def squares(moved: float, before: float) -> list[Signals]:
    return [change(math.sqrt(moved / before), norm=math.sqrt(before))]


@pytest.mark.parametrize("run", every_run("fastcache"))
def test_fastcache_evaluates_where_the_authors_code_does_on_its_signal(run: Fixture) -> None:
    """One of their two implementations divides by the present norm, the other compares with the last evaluation."""
    if run["settings"]["implementation"] == "all blocks":
        found = fastcache(run, lambda step, _: squares(run["since_step"][step][0], run["norm"][step]))
    else:
        found = fastcache(run, lambda step, _: squares(*run["since_evaluation"][step]))
    assert found.evaluated() == run["evaluated"]


@pytest.mark.parametrize("run", every_run("fastcache"))
def test_fastcache_takes_the_papers_signal_where_the_authors_code_takes_another(run: Fixture) -> None:
    """δ = ‖x_t − x_(t−1)‖ ÷ ‖x_(t−1)‖, as their paper says: decisions differ exactly where the two δ lie apart."""
    limit = max(run["settings"]["threshold"], 0.02)
    ours = fastcache(run, lambda step, _: squares(*run["since_step"][step]))
    within = [step for step, (moved, before) in enumerate(run["since_step"]) if math.sqrt(moved / before) <= limit]
    assert ours.evaluated() == [step for step in range(run["settings"]["steps"]) if step not in within or step == 0]
    assert made(policy_named("fastcache"), steps=2, profile=profile(steps=2)).observations(0) == (
        Observation(what=Observed.INPUT, kept=Kept.STEP),
    )
