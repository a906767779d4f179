"""The combine, modulated and probe kernels, run on the CPU from their own source, against the NumPy oracle."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import pytest

from adacorr_deploy.plugins import oracle
from tests.plugins.host_kernels import (
    FLOAT32,
    PRECISIONS,
    ROUNDING,
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


def run_kernel(name: str, precision: str, inputs: Arrays, *, seed: int = 0, unaligned: Collection[str] = ()) -> Array:
    first = next(iter(inputs.values()))
    output, made = (
        ("probe", ((len(first),), FLOAT32)) if name == "probe" else ("tokens_out", (first.shape, first.dtype))
    )
    return run_kernel_over(name, precision, inputs, {output: made}, seed=seed, unaligned=unaligned)[output]


def residual_inputs(shape: tuple[int, ...], precision: str, evaluations: int = 2) -> dict[str, Array]:
    rng = np.random.default_rng(evaluations)
    return {
        "base": normal(1, shape, precision),
        "history": normal(2, (evaluations, 1, *shape), precision),
        "coefficients": rng.uniform(-2, 3, evaluations).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, shape[2]).astype(np.float32),
        "shift": rng.uniform(-0.5, 0.5, shape[2]).astype(np.float32),
    }


def modulated_inputs(shape: tuple[int, ...], precision: str, rows: int = 6, mean: float = 0.0) -> dict[str, Array]:
    return {
        "tokens": encoded(mean + decoded(normal(1, shape, precision), precision), precision),
        "modulation": normal(2, (4, shape[0], rows, shape[2]), precision),
        "step": np.array([2]),
    }


def probe_inputs(shape: tuple[int, ...], precision: str, rows: int = 6, mean: float = 0.0) -> dict[str, Array]:
    probing = {"weights": normal(3, shape[2:]), "bias": normal(4, (1,))}
    return {**modulated_inputs(shape, precision, rows, mean), **probing}


INPUTS: dict[str, Callable[[tuple[int, ...], str], dict[str, Array]]] = {
    "combine": residual_inputs,
    "modulated": modulated_inputs,
    "probe": probe_inputs,
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_combine_matches_the_oracle(precision: str, shape: tuple[int, ...], evaluations: int) -> None:
    inputs = residual_inputs(shape, precision, evaluations)
    expected = oracle.combine(**wide(inputs, precision))
    found = run_kernel("combine", precision, inputs)
    assert_close(found, expected, precision)
    assert run_kernel("combine", precision, inputs, seed=1).tobytes() == found.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [7, 16])
def test_combine_makes_a_residual_and_gives_it_back_with_one_rounding_each(precision: str, width: int) -> None:
    x, y, later = (normal(seed, (2, 5, width), precision) for seed in range(3))
    affine = {"scale": np.ones(width, np.float32), "shift": np.zeros(width, np.float32)}
    made = {"base": y, "history": x[None, None], "coefficients": np.array([-1], np.float32), **affine}
    kept = run_kernel("combine", precision, made)
    np.testing.assert_array_equal(kept, encoded(decoded(y, precision) - decoded(x, precision), precision))
    reused = {"base": later, "history": kept[None, None], "coefficients": np.array([1], np.float32), **affine}
    expected = encoded(decoded(later, precision) + decoded(kept, precision), precision)
    np.testing.assert_array_equal(run_kernel("combine", precision, reused), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1])
@pytest.mark.parametrize("rows", [3, 12])
def test_modulated_matches_the_oracle(precision: str, shape: tuple[int, ...], rows: int) -> None:
    inputs = modulated_inputs(shape, precision, rows, mean=2.0)
    expected = oracle.modulated(**wide(inputs, precision))
    found = run_kernel("modulated", precision, inputs)
    assert_close(found, expected, precision, atol=1e-4)  # of terms of up to about 40
    assert run_kernel("modulated", precision, inputs, seed=1).tobytes() == found.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1])
def test_probe_matches_the_oracle(precision: str, shape: tuple[int, ...]) -> None:
    inputs = probe_inputs(shape, precision, mean=2.0)
    found = run_kernel("probe", precision, inputs)
    np.testing.assert_allclose(found, oracle.probe(**wide(inputs, precision)), rtol=1e-4, atol=1e-4 * shape[2] ** 0.5)
    assert run_kernel("probe", precision, inputs, seed=1).tobytes() == found.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_without_variance_are_their_shift(precision: str) -> None:
    inputs = modulated_inputs((2, 3, 16), precision)
    inputs["tokens"] = encoded(np.full((2, 3, 16), 3.0), precision)
    expected = np.broadcast_to(inputs["modulation"][2, :, None, 0], (2, 3, 16))
    np.testing.assert_array_equal(
        decoded(run_kernel("modulated", precision, inputs), precision), decoded(expected, precision)
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tensor_off_its_alignment_changes_no_bit_of_a_combination(precision: str) -> None:
    inputs = residual_inputs((3, 5, 16), precision, 2)
    expected = run_kernel("combine", precision, inputs)
    for name in (*inputs, "tokens_out"):
        assert run_kernel("combine", precision, inputs, unaligned=(name,)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", ["modulated", "probe"])
def test_tensors_off_their_alignment_change_rounding_alone(precision: str, kernel: str) -> None:
    inputs = (probe_inputs if kernel == "probe" else modulated_inputs)((2, 5, 32), precision)
    expected, output = (
        decoded(run_kernel(kernel, precision, inputs), precision),
        "probe" if kernel == "probe" else "tokens_out",
    )
    for name in (*inputs, output):
        found = decoded(run_kernel(kernel, precision, inputs, unaligned=(name,)), precision)
        np.testing.assert_allclose(found, expected, rtol=2 * ROUNDING[precision], atol=1e-4)


@pytest.mark.parametrize("kernel", ["combine", "modulated", "probe"])
def test_rows_of_a_batch_do_not_mix(kernel: str) -> None:
    inputs = INPUTS[kernel]((3, 7, 16), "float32")
    before = run_kernel(kernel, "float32", inputs)
    (inputs["base"] if kernel == "combine" else inputs["tokens"])[1] = np.nan
    after = run_kernel(kernel, "float32", inputs)
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.isnan(after[1]).all()
