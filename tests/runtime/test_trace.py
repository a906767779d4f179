"""A trace says what each block did, in a form that any reader of JSON takes."""

from __future__ import annotations

import json
import math

from adacorr_deploy.caching.decisions import Action, Decision
from adacorr_deploy.runtime.trace import Branch, Trace


def decision(action: Action, score: float | None = None) -> Decision:
    return Decision(action=action, reason="why", score=score, weight=None if score is None else 0.5)


def test_json_holds_one_record_per_step_block_and_branch() -> None:
    trace = Trace(2, ("block_00",), tuple(Branch))
    trace.record(0, 0, decision(Action.EVALUATE), None)
    trace.record(1, 0, decision(Action.REUSE, 0.25), 1)
    document = json.loads(trace.to_json())
    assert (document["steps"], document["blocks"]) == (2, ["block_00"])
    assert [(r["step"], r["branch"], r["action"]) for r in document["records"]] == [
        (0, "cond", "evaluate"),
        (0, "uncond", "evaluate"),
        (1, "cond", "reuse"),
        (1, "uncond", "reuse"),
    ]
    assert document["records"][3] == {
        "step": 1,
        "block": "block_00",
        "branch": "uncond",
        "action": "reuse",
        "reason": "why",
        "score": 0.25,
        "weight": 0.5,
        "age": 1,
    }
    assert document["records"][0]["age"] is None


def test_rho_counts_reuse_only() -> None:
    trace = Trace(3, ("block_00",), (Branch.COND,))
    assert trace.rho == 0.0
    for step, action in enumerate((Action.EVALUATE, Action.CORRECT, Action.REUSE)):
        trace.record(step, 0, decision(action), None)
    assert (trace.rho, trace.launches) == (1 / 3, 2)


def test_a_score_that_is_not_finite_is_null_in_json() -> None:
    trace = Trace(3, ("block_00",), (Branch.COND,))
    for step, score in enumerate((math.nan, math.inf, -math.inf)):
        trace.record(step, 0, decision(Action.EVALUATE, score), None)
    assert [record["score"] for record in json.loads(trace.to_json())["records"]] == [None] * 3
