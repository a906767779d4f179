"""A controller that lags gets what earlier steps measured; what is launched does not change."""

from __future__ import annotations

import numpy as np
import pytest

from adacorr_deploy.caching.decisions import Action
from adacorr_deploy.runtime import Pipeline, SampleRequest
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import Script

REQUEST = SampleRequest((0, 2), steps=9, guidance=3.0, seed=7)


def script(*, lags: bool, whole_steps: bool) -> Script:
    """Evaluate every third step, and measure all there is."""
    made = Script(
        choose=lambda step, block: Action.EVALUATE if step % 3 == 0 else Action.REUSE, wants_signals=True, measures=True
    )
    made.lags, made.whole_steps = lags, whole_steps
    return made


@pytest.mark.parametrize("whole_steps", [False, True])
def test_signals_come_one_step_late_and_never_across_a_refill(pipeline: Pipeline, whole_steps: bool) -> None:
    prompt, late = (script(lags=lags, whole_steps=whole_steps) for lags in (False, True))
    results = [pipeline.sample(REQUEST, each, history=1) for each in (prompt, late)]
    np.testing.assert_array_equal(results[0].latents, results[1].latents)
    # A slot is filled at steps 0, 3, 6: signals at 1, 2, 3 are against step 0's input, those at 4, 5, 6 against 3's.
    assert {step for step, _ in prompt.signals} == set(range(1, 9))
    assert {step for step, _ in late.signals} == {2, 3, 5, 6, 8}
    for step, block in late.signals:
        assert late.signals[step, block] == prompt.signals[step - 1, block]


@pytest.mark.parametrize("whole_steps", [False, True])
def test_errors_come_two_steps_late_with_the_step_at_which_they_were_measured(
    pipeline: Pipeline, whole_steps: bool
) -> None:
    prompt, late = (script(lags=lags, whole_steps=whole_steps) for lags in (False, True))
    told: list[tuple[int, int]] = []
    present = [0]
    record, choose = late.record_error, late.choose

    def note(step: int, block: int, error: float) -> None:
        told.append((step, present[0]))
        record(step, block, error)

    def choose_now(step: int, block: int) -> Action:
        present[0] = step
        return choose(step, block)

    late.record_error, late.choose = note, choose_now  # type: ignore[method-assign]
    for each in (prompt, late):
        pipeline.sample(REQUEST, each, history=1)
    assert prompt.errors.keys() == late.errors.keys()
    assert late.errors == prompt.errors
    assert {at - measured for measured, at in told} == {1}  # told at the start of the step after, before it decides


@pytest.mark.parametrize("lags", [False, True])
def test_what_was_measured_last_is_not_left_to_the_next_request(
    pipeline: Pipeline, backend: FakeBackend, lags: bool
) -> None:
    first, second = (script(lags=lags, whole_steps=True) for _ in range(2))
    pipeline.sample(REQUEST, first, history=1)
    pipeline.sample(REQUEST, second, history=1)
    assert (first.signals, first.errors) == (second.signals, second.errors)
