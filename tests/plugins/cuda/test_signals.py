"""The signals kernel, run on the CPU from its own source, against the NumPy oracle.

The same bits for every order of blocks and warps, nothing touched outside its tensors, a scratch fit for the next
launch. What only a GPU can show (races between blocks, speed) is tools/benchmarks/kernels.py's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest

from adacorr_deploy.plugins import oracle
from adacorr_deploy.plugins.service_parts import SIGNAL_COUNT
from tests.plugins.host_kernels import (
    FLOAT32,
    PRECISIONS,
    SHAPES,
    Array,
    decoded,
    encoded,
    launch_of,
    needs_compiler,
    normal,
    run_kernel_over,
    run_launch,
)

pytestmark = needs_compiler


BOTH = ("tokens", "reference")


def run_signals(
    tokens: Array, reference: Array, precision: str, *, seed: int = 0, unaligned: Collection[str] = ()
) -> Array:
    inputs, outputs = {"tokens": tokens, "reference": reference}, {"signals": ((len(tokens), SIGNAL_COUNT), FLOAT32)}
    return run_kernel_over("signals", precision, inputs, outputs, seed=seed, unaligned=unaligned)["signals"]


def pair(shape: tuple[int, ...], precision: str, *, change: float = 0.1, size: float = 1.0) -> tuple[Array, Array]:
    """Return (tokens, reference) that differ by `change` of their size."""
    reference = normal(1, shape, precision, size)
    moved = decoded(reference, precision) + size * change * normal(2, shape)
    return encoded(moved, precision), reference


def expected_signals(tokens: Array, reference: Array, precision: str) -> Array:
    return oracle.signals(decoded(tokens, precision), decoded(reference, precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-2, 1.0, 100.0])
def test_signals_match_the_oracle(precision: str, shape: tuple[int, ...], size: float) -> None:
    tokens, reference = pair(shape, precision, size=size)
    expected = expected_signals(tokens, reference, precision)
    np.testing.assert_allclose(run_signals(tokens, reference, precision), expected, rtol=1e-4, atol=2e-6 * (1 + size))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [7, 8, 1152])
def test_a_large_mean_or_one_large_channel_leaves_the_deviation_exact(precision: str, width: int) -> None:
    tokens, reference = (decoded(each, precision) for each in pair((2, 40, width), precision))
    for added in (np.array(50), 900 * np.eye(1, width)):
        current, kept = encoded(tokens + added, precision), encoded(reference + added, precision)
        found, expected = run_signals(current, kept, precision), expected_signals(current, kept, precision)
        np.testing.assert_allclose(found[:, 4], expected[:, 4], rtol=2e-4)
        np.testing.assert_allclose(found[:, 2], expected[:, 2], atol=2e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("unaligned", [(), ("tokens",), ("reference",), BOTH])
def test_nothing_changed_gives_exactly_no_change(precision: str, unaligned: tuple[str, ...]) -> None:
    for tokens in (normal(1, (2, 33, 144), precision), encoded(np.zeros((2, 33, 144)), precision)):
        found = run_signals(tokens, tokens.copy(), precision, unaligned=unaligned)
        np.testing.assert_array_equal(found[:, :4], 0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_signals_are_the_same_bits_in_any_order_and_off_any_alignment(precision: str) -> None:
    tokens, reference = pair((3, 100, 144), precision)
    expected = run_signals(tokens, reference, precision)
    for seed in (1, 2, 3):
        np.testing.assert_array_equal(run_signals(tokens, reference, precision, seed=seed), expected)
    unaligned = run_signals(
        tokens, reference, precision, unaligned=BOTH
    )  # element by element: other sums, other rounding
    np.testing.assert_allclose(unaligned, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run_signals(tokens, reference, precision, unaligned=BOTH, seed=1), unaligned)


@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_signals_are_the_same_bits_for_any_grid_and_one_block_takes_any_scratch(threads: int) -> None:
    """TensorRT's plugin has no zeroed memory, so it launches one block per row."""
    tokens, reference = pair((2, 100, 64), "float16")
    outputs = {"signals": ((2, SIGNAL_COUNT), FLOAT32)}
    inputs = {"tokens": tokens, "reference": reference}
    usual = launch_of("signals", "float16", inputs, outputs)
    found: list[Array] = []
    for blocks in (1, 2, 5, 13, 40):
        launch = replace(usual, grid=(blocks, 2, 1), block=(threads, 1, 1))
        scratch = np.full(usual.scratch or (), np.nan if blocks == 1 else 0.0, np.float32)
        found.append(run_launch(launch, inputs, outputs, scratch=scratch, seed=blocks)["signals"])
        np.testing.assert_array_equal(found[-1], found[0])
    np.testing.assert_allclose(found[0], run_signals(tokens, reference, "float16"), rtol=1e-6, atol=1e-6)


def test_a_scratch_serves_launch_after_launch() -> None:
    outputs = {"signals": ((3, SIGNAL_COUNT), FLOAT32)}
    scratch = np.zeros((3, 61, 8), np.float32)
    for seed in range(4):
        tokens, reference = normal(seed, (3, 60, 24)), normal(seed + 9, (3, 60, 24))
        inputs = {"tokens": tokens, "reference": reference}
        launch = launch_of("signals", "float32", inputs, outputs)
        assert launch.scratch == scratch.shape
        found = run_launch(launch, inputs, outputs, scratch=scratch, seed=seed)["signals"]
        np.testing.assert_array_equal(found, run_signals(tokens, reference, "float32"))
        assert (scratch[:, 0].view(np.uint32) == 0).all(), "the counters"


@pytest.mark.parametrize("tokens", [1, 2, 19, 20, 21, 100, 2047, 2048, 2049, 3000])
def test_p95_is_the_very_token(tokens: int) -> None:
    """Also past what a block keeps in shared memory."""
    ratios = np.random.default_rng(tokens).permutation(tokens).astype(np.float32) + 1
    current, reference = (1 + ratios)[None, :, None], np.ones((1, tokens, 1), np.float32)
    found = run_signals(current, reference, "float32", seed=1)[0, 1]
    assert found == pytest.approx(np.sort(ratios)[::-1][oracle.p95_rank(tokens) - 1], rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["tokens", "reference", "both"])
@pytest.mark.parametrize("width", [7, 64])
def test_a_bad_number_anywhere_makes_its_row_not_finite(precision: str, bad: float, where: str, width: int) -> None:
    for place in ((1, 0, 0), (1, 12, width - 1), (1, 29, width // 2)):
        tokens, reference = (decoded(each, precision) for each in pair((3, 30, width), precision))
        for name, array in (("tokens", tokens), ("reference", reference)):
            if where in (name, "both"):
                array[place] = bad
        found = run_signals(encoded(tokens, precision), encoded(reference, precision), precision)
        assert not np.isfinite(found[1, 0])
        assert np.isfinite(found[[0, 2]]).all(), "the other rows are untouched"


@pytest.mark.parametrize("size", [1e18, 1e19, 1e20, 1e30, 3e38])
@pytest.mark.parametrize(
    ("precision", "change"), [("float32", 1e-6), ("float32", 1e-3), ("float32", 0.5), ("bfloat16", 0.5)]
)
def test_huge_values_give_the_truth_or_no_number(size: float, precision: str, change: float) -> None:
    """x/inf = 0 must not pass for "nothing changed"."""
    reference = encoded(np.full((1, 7, 16), size), precision)
    current = encoded(decoded(reference, precision) * np.float32(1 - change), precision)
    found, expected = (
        run_signals(current, reference, precision)[0, 0],
        expected_signals(current, reference, precision)[0, 0],
    )
    assert not np.isfinite(found) or found == pytest.approx(expected, rel=1e-3)
