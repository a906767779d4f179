"""A revised output lies on the polynomial through the evaluations around it, the less the longer the skip was."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.caching.policy_model import Policy
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import PolicyError


def test_between_two_evaluations_lies_their_line() -> None:
    assert Revision.LINEAR.coefficients(7, [8, 4, 2]) == pytest.approx((0.75, 0.25))


def test_of_one_skipped_step_the_parabola_counts_whole() -> None:
    """At step 7 of 8, 6 and 4: 1·3/(2·4), 1·3/(2·2) and −1·1/(4·2), newest first."""
    assert Revision.QUADRATIC.coefficients(7, [8, 6, 4]) == pytest.approx((3 / 8, 3 / 4, -1 / 8))


def test_of_three_skipped_steps_a_third_is_extrapolated() -> None:
    """S = 1 / (1 + 2/4): at step 7, the parabola through 9, 5 and 4, and the line through 5 and 4."""
    parabola, line = np.array([6 / 20, 6 / 4, -4 / 5]), np.array([0.0, 3.0, -2.0])
    expected = parabola * 2 / 3 + line / 3
    assert Revision.QUADRATIC.coefficients(7, [9, 5, 4]) == pytest.approx(expected.tolist())


def test_the_second_evaluation_of_a_run_has_none_before_it() -> None:
    assert Revision.QUADRATIC.coefficients(1, [2, 0]) == pytest.approx((0.5, 0.5))


@given(
    st.sampled_from([Revision.LINEAR, Revision.QUADRATIC]),
    st.integers(2, 9),
    st.integers(1, 9),
    st.data(),
)
def test_what_is_linear_in_the_step_is_revised_to_itself(
    revision: Revision, skipped: int, gap: int, data: st.DataObject
) -> None:
    evaluations = [gap + skipped, gap, 0]
    step = data.draw(st.integers(gap + 1, gap + skipped - 1))
    weights = revision.coefficients(step, evaluations)
    assert len(weights) == revision.evaluations
    outputs = 3.0 - 2.0 * np.array(evaluations[: len(weights)])
    assert float(np.dot(weights, outputs)) == pytest.approx(3.0 - 2.0 * step)


def test_revision_alone_leaves_the_decisions_to_the_base() -> None:
    base, revised = policy_named("fbcache@0.05"), policy_named("fbcache@0.05+revised")
    assert revised.predictor.revision is Revision.LINEAR
    assert revised.name == "fbcache@0.05+revised"
    unlike = {"name": base.name, "predictor": base.predictor}
    assert revised.model_copy(update=unlike) == base
    assert not revised.looks_up


def test_what_holds_outputs_keeps_its_own_revision() -> None:
    assert policy_named("scheduled@2+revised").predictor == policy_named("scheduled@2").predictor


@pytest.mark.parametrize(("name", "expected"), [("teacache", Revision.LINEAR), ("lazydit", Revision.NONE)])
def test_adacorrection_revises_where_all_blocks_decide_together(name: str, expected: Revision) -> None:
    assert policy_named(f"{name}+adacorrection@2").revision is expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none+revised", "none skips no steps that could be revised"),
        ("fewer-steps@2+revised", "skips no steps"),
        ("fora+revised@2", "has no target: leave out '@2'"),
    ],
)
def test_where_nothing_can_be_revised_the_reason_is_told(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_named(name)


def test_the_device_takes_no_step_again() -> None:
    raw = {
        "name": "mine",
        "gate": {"kind": "paper"},
        "predictor": {"kind": "hold", "revision": "linear"},
        "decide": "device",
    }
    with pytest.raises(ValidationError, match=r"predictor\.revision is linear.*decide device takes none"):
        Policy.model_validate(raw)
