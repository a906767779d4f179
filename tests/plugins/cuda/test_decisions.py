"""The decision kernel, run on the CPU from its own source: the oracle's decisions, bit for bit."""

from __future__ import annotations

import ctypes
import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.caching.block_rules import BlockRule
from adacorr_deploy.plugins.decision_kernels import (
    DECIDE_KERNEL,
    NEVER,
    NOTE_KERNEL,
    RECORD_COLUMNS,
    RULE_COLUMNS,
    THREADS,
    Verdict,
    rule_row,
)
from adacorr_deploy.plugins.decision_oracle import decide
from adacorr_deploy.plugins.service_parts import SIGNAL_COUNT
from tests.plugins.host_kernels import Array, GuardedBuffer, KernelArgument, host_kernels, needs_compiler

pytestmark = needs_compiler

STEPS, BLOCKS, HANDLE = 12, 3, 2**63 + 5
UNTOUCHED = -7
LAZY = BlockRule(
    lambda_=1,
    gamma=1,
    epsilon=0.1,
    floor=0,
    lazy=True,
    warmup_steps=0,
    final_steps=0,
    max_age_steps=9,
    protected=False,
)

RULES = st.builds(
    BlockRule,
    lambda_=st.floats(0, 100),
    gamma=st.floats(1e-3, 100),
    epsilon=st.floats(0, 0.99),
    floor=st.one_of(st.floats(0, 4), st.just(1e300)),  # beyond 2⁵³ a floor and one more than it are the same
    lazy=st.booleans(),
    warmup_steps=st.integers(0, 5),
    final_steps=st.integers(0, 5),
    max_age_steps=st.integers(1, 6),
    protected=st.sampled_from([False, False, False, True]),
)
NUMBERS = st.one_of(st.floats(0, 2, width=32), st.sampled_from([0.0, math.nan, math.inf, 3e38]))


@st.composite
def signal_rows(draw: st.DrawFn) -> tuple[int, NDArray[np.float32]]:
    images, branches = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    usual = draw(st.booleans())  # else NaN and the like are among them
    number = st.floats(0, 2, width=32) if usual else NUMBERS
    count = images * branches * SIGNAL_COUNT
    values = draw(st.lists(number, min_size=count, max_size=count))
    return images, np.array(values, np.float32).reshape(-1, SIGNAL_COUNT)


def integer(value: int) -> GuardedBuffer:
    return filled_buffer(np.array([value], np.int64))


def filled_buffer(values: Array) -> GuardedBuffer:
    buffer = GuardedBuffer(values.nbytes)
    buffer.bytes[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return buffer


def run_decide(
    rule: BlockRule, signals: NDArray[np.float32], images: int, step: int, filled: int, block: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], list[tuple[int, int]]]:
    """Return the scores, the trace and the conditions that the kernel left."""
    rows = len(signals)
    inputs = [filled_buffer(signals), integer(step), integer(filled), filled_buffer(rule_row(rule))]
    scores = filled_buffer(np.full(rows, -1, np.float32))
    trace = filled_buffer(np.full((STEPS, BLOCKS, len(RECORD_COLUMNS)), UNTOUCHED, np.int64))
    buffers = [*inputs, scores, trace]
    before = [buffer.bytes.copy() for buffer in inputs]
    arguments: list[KernelArgument] = [
        *(ctypes.c_void_p(buffer.address) for buffer in inputs),
        *(ctypes.c_int(value) for value in (rows, images, STEPS, block, BLOCKS)),
        *(ctypes.c_void_p(buffer.address) for buffer in (scores, trace)),
        ctypes.c_ulonglong(HANDLE),
    ]
    host_kernels().run_kernel(DECIDE_KERNEL, (1, 1, 1), (THREADS, 1, 1), 0, arguments, seed=seed)
    for buffer, values in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(buffer.bytes, values)
    for buffer in buffers:
        buffer.check(DECIDE_KERNEL)
    records = trace.bytes.copy().view(np.int64).reshape(STEPS, BLOCKS, -1)
    return scores.bytes.copy().view(np.float32), records, host_kernels().conditions_set()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rule=RULES,
    rows=signal_rows(),
    step=st.integers(0, STEPS - 1),
    ago=st.integers(0, 7),
    block=st.integers(0, BLOCKS - 1),
    seed=st.integers(0, 3),
)
def test_the_kernel_decides_what_the_oracle_does_to_the_last_bit(
    rule: BlockRule, rows: tuple[int, NDArray[np.float32]], step: int, ago: int, block: int, seed: int
) -> None:
    images, signals = rows
    filled = step - ago if 0 < ago <= step else NEVER
    expected = decide(rule, signals, images=images, step=step, steps=STEPS, filled=filled)
    scores, trace, conditions = run_decide(rule, signals, images, step, filled, block, seed)
    found = trace[step, block]
    np.testing.assert_array_equal(found[:3], expected.record[:3])
    assert Verdict.of(found) == expected
    assert conditions == [(HANDLE, expected.action)]
    trace[step, block] = UNTOUCHED
    assert (trace == UNTOUCHED).all(), "a decision writes its own record and no other"
    with np.errstate(over="ignore"):
        score = np.float32(np.nan if expected.score is None else expected.score)
    np.testing.assert_array_equal(scores, np.full(len(signals), score))


@pytest.mark.parametrize("step", [-1, STEPS, 2**40])
def test_outside_a_run_the_kernel_does_nothing(step: int) -> None:
    scores, trace, conditions = run_decide(LAZY, np.zeros((2, SIGNAL_COUNT), np.float32), 1, step, 0, 0, 0)
    assert (scores == -1).all() and (trace == UNTOUCHED).all() and conditions == []


def test_an_evaluation_is_noted_once() -> None:
    step, filled, launches = (integer(value) for value in (9, 4, 41))
    arguments = [ctypes.c_void_p(buffer.address) for buffer in (step, filled, launches)]
    host_kernels().run_kernel(NOTE_KERNEL, (1, 1, 1), (THREADS, 1, 1), 0, arguments, seed=3)
    assert [int(buffer.bytes.view(np.int64)[0]) for buffer in (step, filled, launches)] == [9, 9, 42]


def test_both_languages_lay_out_the_same_rows() -> None:
    from adacorr_deploy.plugins.kernel_compiler import DECISIONS_PROGRAM, SOURCES

    text = (SOURCES / DECISIONS_PROGRAM).read_text()
    assert f"RECORD = {len(RECORD_COLUMNS)};" in text
    rule = text.partition("struct Rule {")[2].partition("}")[0]
    assert re.findall(r"(\w+)[,;]", rule.replace("_bits", "")) == list(RULE_COLUMNS)
    assert f"ROW_SIGNALS = {SIGNAL_COUNT};" in text
