"""A slot's ring keeps the last evaluations where they were written, and finds each again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.caching.decisions import Prediction, SlotHistory
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.runtime.slots import CacheSlot
from tests.runtime.fake_backend import FakeBuffer


def slot_of(capacity: int) -> CacheSlot:
    ring = FakeBuffer(np.zeros((capacity, 2, 1, 1, 1), np.float32))
    return CacheSlot(ring=ring, zeros=FakeBuffer(np.zeros((1, 1, 1), np.float32)), history=SlotHistory(capacity))


@given(capacity=st.integers(1, 3), evaluations=st.integers(1, 9), data=st.data())
def test_a_window_holds_each_evaluation_with_its_own_factors(
    capacity: int, evaluations: int, data: st.DataObject
) -> None:
    slot = slot_of(capacity)
    for step in range(evaluations):
        slot.ring[slot.next_entry].write(np.full((2, 1, 1, 1), step, np.float32))
        slot.record(step)
    wanted = data.draw(st.integers(1, min(capacity, evaluations)))
    newest_first = [evaluations - 1 - index for index in range(wanted)]
    window = slot.window(Prediction(coefficients=tuple(s + 0.5 for s in newest_first), gate_steps=tuple(newest_first)))
    held = slot.ring[window.start : window.stop].read()[:, 0, 0, 0, 0]
    used = [entry for entry, coefficient in enumerate(window.coefficients) if coefficient]
    assert sorted(held[used].tolist()) == sorted(newest_first)
    for entry in used:
        assert window.coefficients[entry] == held[entry] + 0.5
        assert window.gate_steps[entry] == held[entry]
    assert window.entries == len(window.coefficients) == len(window.gate_steps) == len(held)
    assert slot.history.age(evaluations + 1) == 2


def test_the_newest_two_of_three_may_stand_at_the_two_ends() -> None:
    slot = slot_of(3)
    for step in range(4):
        slot.record(step)
    window = slot.window(Prediction(coefficients=(2.0, -1.0), gate_steps=(8, 7)))
    assert (window.start, window.stop) == (0, 3)
    assert window.coefficients == (2.0, 0.0, -1.0)
    assert (window.gate_steps[0], window.gate_steps[2]) == (8, 7)


def test_the_ring_is_written_in_turn() -> None:
    slot = slot_of(2)
    entries = []
    for step in range(5):
        entries.append(slot.next_entry)
        slot.record(step)
    assert entries == [0, 1, 0, 1, 0]
    assert slot.history.steps == [4, 3]


@pytest.mark.parametrize(
    "prediction",
    [
        Prediction(coefficients=(), gate_steps=()),
        Prediction(coefficients=(1.0, 1.0), gate_steps=(0, 0)),
        Prediction(coefficients=(1.0,), gate_steps=()),
    ],
)
def test_a_prediction_from_more_than_the_slot_holds_is_refused(prediction: Prediction) -> None:
    slot = slot_of(2)
    slot.record(0)
    with pytest.raises(PolicyError, match="Let it evaluate the block first"):
        slot.window(prediction)


def test_a_cleared_slot_holds_nothing() -> None:
    slot = slot_of(2)
    slot.keep_references(1, lambda: FakeBuffer(np.ones((1, 1, 1), np.float32)))
    slot.ring.write(np.full(slot.ring.shape, np.nan, np.float32))
    slot.record(3)
    slot.clear()
    assert not slot.ring.read().any()
    assert slot.reference is not None
    assert not slot.reference.read().any()
    assert (slot.history.steps, slot.next_entry, slot.history.age(4)) == ([], 0, None)


def test_the_reference_is_allocated_once_and_hidden_from_policies_that_do_not_want_it() -> None:
    slot = slot_of(1)
    slot.keep_references(1, lambda: FakeBuffer(np.ones((1, 1, 1), np.float32)))
    first = slot.reference
    slot.keep_references(0, lambda: FakeBuffer(np.ones((1, 1, 1), np.float32)))
    assert slot.reference is None
    slot.keep_references(1, lambda: FakeBuffer(np.ones((1, 1, 1), np.float32)))
    assert slot.reference is first
