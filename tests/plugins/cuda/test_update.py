"""The predict and blend kernels, run on the CPU from their own source, against the NumPy oracle."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest

from adacorr_deploy.plugins import oracle
from adacorr_deploy.plugins.kernels import KERNELS
from tests.plugins.host_kernels import (
    FLOAT32,
    PRECISIONS,
    SHAPES,
    Array,
    Arrays,
    assert_close,
    decoded,
    encoded,
    needs_compiler,
    normal,
    run_kernel_over,
    wide,
)

pytestmark = needs_compiler


def slot_inputs(shape: tuple[int, ...], precision: str, evaluations: int, units: int) -> dict[str, Array]:
    rng = np.random.default_rng(evaluations + units)
    rows, _, width = shape
    return {
        "history": normal(3, (evaluations, units, *shape), precision),
        "modulation": normal(4, (5, rows, 3 * units, width), precision),
        "gate_steps": rng.integers(0, 5, evaluations),
        "coefficients": rng.uniform(-2, 3, evaluations).astype(np.float32),
    }


def run_update(
    kernel: str, precision: str, inputs: Arrays, *, seed: int = 0, unaligned: Collection[str] = ()
) -> Arrays:
    base = inputs["base" if kernel == "blend" else "tokens"]
    outputs = {"tokens_out": (base.shape, base.dtype), "weight": ((len(base),), FLOAT32)}
    outputs = {name: outputs[name] for name in KERNELS[kernel].outputs}
    return run_kernel_over(kernel, precision, inputs, outputs, seed=seed, unaligned=unaligned)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("evaluations", "units"), [(1, 2), (2, 2), (3, 2), (2, 4), (1, 1), (3, 1), (2, 3)])
def test_predict_matches_the_oracle(precision: str, shape: tuple[int, ...], evaluations: int, units: int) -> None:
    inputs = {"tokens": normal(5, shape, precision), **slot_inputs(shape, precision, evaluations, units)}
    expected = oracle.predict(**wide(inputs, precision))
    found = run_update("predict", precision, inputs)["tokens_out"]
    assert_close(found, expected, precision)
    for seed in (1, 2):
        assert run_update("predict", precision, inputs, seed=seed)["tokens_out"].tobytes() == found.tobytes()


def blend_inputs(
    shape: tuple[int, ...], precision: str, estimate: list[float], evaluations: int = 2
) -> dict[str, Array]:
    return {
        "base": normal(5, shape, precision),
        **slot_inputs(shape, precision, evaluations, 2),
        "fresh": normal(6, shape, precision),
        "estimate": np.array(estimate, np.float32),
        "thresholds": np.array([0.1, 0.3, 1.0], np.float32),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_blend_matches_the_oracle(precision: str, shape: tuple[int, ...], evaluations: int) -> None:
    inputs = blend_inputs(shape, precision, [0.12, 0.2, 0.28][: shape[0]], evaluations)
    expected, weight = oracle.blend(**wide(inputs, precision))
    found = run_update("blend", precision, inputs)
    np.testing.assert_allclose(found["weight"], weight, atol=1e-6)
    assert_close(found["tokens_out"], expected, precision)
    assert run_update("blend", precision, inputs, seed=1)["tokens_out"].tobytes() == found["tokens_out"].tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["base", "history", "modulation", "fresh", "tokens_out", "all of them"])
def test_a_tensor_off_its_alignment_changes_no_bit(precision: str, name: str) -> None:
    inputs = blend_inputs((3, 5, 16), precision, [0.2, 0.0, 9.0])
    unaligned = (*inputs, "tokens_out", "weight") if name == "all of them" else (name,)
    expected = run_update("blend", precision, inputs)
    found = run_update("blend", precision, inputs, unaligned=unaligned)
    assert all(found[output].tobytes() == expected[output].tobytes() for output in expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [7, 16])
def test_weight_zero_is_the_prediction_and_weight_one_the_fresh_output_bit_for_bit(precision: str, width: int) -> None:
    estimate = [0.0, 0.1, 0.3, 9.0, np.nan, np.inf, -np.inf]
    inputs = blend_inputs((7, 5, width), precision, estimate)
    inputs["fresh"][2:, 0] = encoded(np.array(-0.0), precision)  # −0 + 0·x would be +0
    found = run_update("blend", precision, inputs)
    slot = {name: inputs[name] for name in ("history", "modulation", "gate_steps", "coefficients")}
    prediction = run_update("predict", precision, {"tokens": inputs["base"], **slot})["tokens_out"]
    np.testing.assert_array_equal(found["weight"], [0, 0, 1, 1, 1, 1, 1])
    assert found["tokens_out"][:2].tobytes() == prediction[:2].tobytes()
    assert found["tokens_out"][2:].tobytes() == inputs["fresh"][2:].tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [7, 16])
def test_a_spoilt_slot_does_not_survive_its_recomputation(precision: str, width: int) -> None:
    inputs = blend_inputs((2, 5, width), precision, [np.nan, 0.0])
    inputs["history"][:, :, 0] = encoded(np.array(np.nan), precision)
    inputs["fresh"][1] = encoded(np.array(np.inf), precision)
    found = run_update("blend", precision, inputs)["tokens_out"]
    np.testing.assert_array_equal(found[0], inputs["fresh"][0])
    assert np.isfinite(decoded(found[1], precision)).all()


@pytest.mark.parametrize("thresholds", [(np.nan, 0.3, 1.0), (0.05, 0.05, 1.0), (0.1, 0.3, np.nan)])
def test_thresholds_that_give_no_number_recompute(thresholds: tuple[float, ...]) -> None:
    inputs = blend_inputs((2, 3, 8), "float32", [0.05, 0.05])
    inputs["thresholds"] = np.array(thresholds, np.float32)
    np.testing.assert_array_equal(run_update("blend", "float32", inputs)["weight"], 1)


def test_the_weight_follows_the_oracle_over_its_whole_range() -> None:
    estimate = np.linspace(-0.5, 1.5, 101).astype(np.float32)
    for thresholds in ((0.1, 0.3, 1.0), (0.0, 1.0, 0.5), (0.2, 0.2, 1.0), (0.3, 0.1, 2.0)):
        inputs = blend_inputs((101, 1, 1), "float32", list(estimate))
        inputs["thresholds"] = np.array(thresholds, np.float32)
        found = run_update("blend", "float32", inputs)["weight"]
        np.testing.assert_allclose(found, oracle.blend_weight(estimate, inputs["thresholds"]), atol=2e-6)


def test_rows_of_a_batch_do_not_mix() -> None:
    shape = (3, 7, 16)
    inputs = {"tokens": normal(5, shape), **slot_inputs(shape, "float32", 2, 2)}
    before = run_update("predict", "float32", inputs)["tokens_out"]
    inputs["history"][:, :, 1] = np.float32(np.nan)
    after = run_update("predict", "float32", inputs)["tokens_out"].astype(np.float32)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.isnan(after[1]).all()
