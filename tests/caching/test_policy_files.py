"""Random policy files: each runs to the end, every step decided and the guards kept, or is refused with a reason."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adacorr_deploy.caching.controllers import Run
from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.caching.policy import PRESETS, Policy, policy_named
from adacorr_deploy.core.errors import CalibrationError, PolicyError
from tests.caching.driven import Driven, change, drive, made
from tests.caching.scripted_calibration import STEPS, calibration
from tests.caching.scripted_profile import profile

PARTS: Final = 10

Content = dict[str, object]

# A file starts from one of these: every preset, and the two that a file of their own completes.
_OF_FILES: Final[dict[str, Content]] = {
    "static-mask": {"name": "static-mask", "gate": {"kind": "mask", "rows": ["1"] + ["0", "1"] * 5 + ["1"]}},
    "l2c": {"name": "l2c", "gate": {"kind": "router", "scores": [[1.0] * PARTS, [0.05, 0.5] * (PARTS // 2)] * 6}},
}
_BASES: Final[dict[str, Content]] = {
    **{name: policy.model_dump(mode="json", by_alias=True) for name, policy in PRESETS.items()},
    **_OF_FILES,
}

# Then some fields of its tables are changed: to what fits, to what is out of range, and to what others' tables hold.
_GATE: Final[Mapping[str, list[object]]] = {
    "speedup": [1, 2.5, 20, 0.5],
    "interval": [1, 3, 100, 0, 2.5],
    "offset": [0, 2],
    "threshold": [0.0, 0.1, 0.9, 1000, -1],
    "alpha": [0.05, 0.18, 0.999, 1],
    "delta": [0.0, 0.5],
    "max_skipped": [1, 3, 64, 0],
    "scale": [0.05, 1.0],
    "retention": [0.0, 0.2, 1.0],
    "tolerance": [0.1, 1.0, 1000],
    "codebook": [[[0.1, 3], [1.0, 1]], [[1.0, 1000]], [[0.2, 2], [0.1, 1]], []],
    "motion": [None, {}],
    "max_reused_steps": [None, 0, 3],
    "dynamic": [True, False],
    "relax": [1.25, 10],
    "gamma": [0.1, 1, 100],
    "band": [0.0, 0.1, 0.99, 1.0],
    "adaptivity": [0, 0.5, 1],
    "memory": [0, 0.3],
    "offset_margin": [1, 1000],
    "corrector": ["defer", "paper", "cheap", "none"],
    "lazy": [True, False],
    "lambda": [0, 1, 2],
    "epsilon": [0, 0.05],
    "rows": [["1"] * STEPS, ["1" * PARTS, *["01" * (PARTS // 2)] * (STEPS - 1)], ["1", "0"], ["0"] * STEPS],
    "scores": [[[1.0] * PARTS] * STEPS, [[0.5, 0.05] * (PARTS // 2)] * STEPS, [[1.0]]],
}
_OTHERS: Final[Mapping[str, Mapping[str, list[object]]]] = {
    "predictor": {
        "kind": ["hold", "taylor", "gated", "gated-taylor", "output-taylor", "residual", "residual-taylor", "affine"],
        "order": [1, 2, 3],
    },
    "spans": {"granularity": ["parts", "range", "step"], "first": [0, 1, 3, 20], "last": [0, 1]},
    "guards": {
        "warmup_steps": [0, 1, 5, 13],
        "final_steps": [0, 3],
        "max_age_steps": [1, 3, 1000],
        "protected_blocks": [[], [0], [3]],
    },
    "correction": {
        "mode": ["robust", "paper-lazy", "paper-exact", "paper"],
        **{name: _GATE[name] for name in ("speedup", "gamma", "band", "adaptivity", "memory", "corrector", "epsilon")},
    },
}


@st.composite
def files(draw: st.DrawFn) -> Content:
    """A preset with up to three fields changed, and sometimes AdaCorrection on top."""
    content: Content = json.loads(json.dumps(_BASES[draw(st.sampled_from(sorted(_BASES)))]))
    if draw(st.integers(0, 2)) == 0:
        content["correction"] = draw(st.sampled_from([{}, {"mode": "paper-lazy"}, {"mode": "paper-exact"}]))
    for _ in range(draw(st.integers(0, 3))):
        table = draw(st.sampled_from(["gate", *_OTHERS]))
        held = content.get(table) or {}
        assert isinstance(held, dict)
        names = [name for name in _GATE if name in held] if table == "gate" else list(_OTHERS[table])
        if draw(st.integers(0, 9)) == 0:
            names = list(_GATE)  # a field that this table need not have
        if names:
            name = draw(st.sampled_from(names))
            held[name] = draw(st.sampled_from((_OTHERS[table] if name in _OTHERS.get(table, {}) else _GATE)[name]))
            content[table] = held
    return content


SIGNALS: Final = st.lists(
    st.sampled_from([0.0, 0.01, 0.1, 0.5, float("inf"), float("nan")]), min_size=STEPS, max_size=STEPS
)


def outcome(content: Content, relatives: list[float], *, halves: bool) -> tuple[Policy, Driven] | str:
    """What became of a file: a policy that ran, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.json"
        path.write_text(json.dumps(content))
        try:
            policy = policy_named(str(path))
        except PolicyError as error:
            return str(error)
    steps = policy.sampled_steps(STEPS)
    run = Run(steps=steps, blocks=PARTS, halves=(("attention", "mlp"),) * (PARTS // 2) if halves else ())
    try:
        spans = policy.spans_of(run)
        controller = made(
            policy,
            steps=steps,
            blocks=PARTS,
            halves=halves,
            calibration=calibration(predictor=policy.predictor, spans=spans, blocks=PARTS),
            profile=profile(steps=steps, parts=PARTS),
        )
    except (PolicyError, CalibrationError) as error:
        return str(error)
    measured = drive(
        controller,
        steps,
        signals=lambda step, span: [change(relatives[step], probe=relatives[step] - 0.1)] * 2,
        changes=lambda step, span: [change(relatives[step])] * 2,
    )
    return policy, measured


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=files(), relatives=SIGNALS, halves=st.booleans())
def test_a_random_policy_file_runs_or_is_refused_with_a_reason(
    content: Content, relatives: list[float], halves: bool
) -> None:
    found = outcome(content, relatives, halves=halves)
    if isinstance(found, str):
        assert len(found) > 20
        assert "\n" not in found
        return
    policy, driven = found
    assert len(driven.decisions) == policy.sampled_steps(STEPS)
    for step, row in enumerate(driven.decisions):
        for decision in row:
            assert decision.reason
            assert decision.weight is None or 0 <= decision.weight <= 1
            assert decision.action is not Action.CORRECT or decision.thresholds is not None
            if step == 0 or (policy.caches and step < policy.guards.warmup_steps):
                assert decision.action is Action.EVALUATE


def test_of_such_files_many_run_and_many_are_refused() -> None:
    """Or the property above would say little."""
    counts: Counter[bool] = Counter()

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(content=files())
    def count(content: Content) -> None:
        counts[isinstance(outcome(content, [0.01] * STEPS, halves=False), str)] += 1

    count()
    assert min(counts[True], counts[False]) > 40


@pytest.mark.parametrize("name", list(_BASES))
@pytest.mark.parametrize("halves", [False, True])
def test_every_row_of_the_table_runs(name: str, halves: bool) -> None:
    content = json.loads(json.dumps(_BASES[name]))
    if halves and name in ("dbcache", "dbprune"):
        content["spans"]["first"] = 2  # five blocks are ten halves
    assert not isinstance(outcome(content, [0.01] * STEPS, halves=halves), str)
