"""The kernels over latent images, run on the CPU from their own source, against the NumPy oracle."""

from __future__ import annotations

import numpy as np
import pytest

from adacorr_deploy.plugins import oracle
from tests.plugins.host_kernels import FLOAT32, Array, needs_compiler, normal, run_kernel_over

pytestmark = needs_compiler


@pytest.mark.parametrize("image", [(1, 1, 1), (1, 28, 28), (4, 32, 32), (3, 7, 5)])
@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_extrapolate_matches_the_oracle(image: tuple[int, ...], evaluations: int) -> None:
    batch = (3, *image)
    rng = np.random.default_rng(evaluations)
    table, step = rng.standard_normal((6, 8)).astype(np.float32), int(rng.integers(6))
    inputs = {
        "latents": normal(1, batch),
        "history": normal(2, (evaluations, 1, *batch)),
        "factors": rng.uniform(-2, 3, evaluations).astype(np.float32),
        "step": np.array([step], np.int64),
        "coefficients": table,
        "noise": normal(3, batch),
        "carried": normal(4, batch),
    }
    outputs = dict.fromkeys(("latents_out", "model_output", "carried_out"), (batch, FLOAT32))
    named = {name: inputs[name] for name in ("latents", "history", "factors", "noise", "carried")}
    expected = oracle.extrapolate(**named, sampler_row=table[step])
    for seed in (0, 1, 2):
        found = run_kernel_over("extrapolate", "float16", inputs, outputs, seed=seed)  # whatever the tokens are made of
        for name, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=2e-6)


def output_error(predicted: Array, fresh: Array, seed: int = 0) -> Array:
    inputs, outputs = {"predicted": predicted, "fresh": fresh}, {"error": ((len(fresh),), FLOAT32)}
    return run_kernel_over("output_error", "float32", inputs, outputs, seed=seed)["error"]


@pytest.mark.parametrize("image", [(1, 1, 1), (1, 28, 28), (4, 32, 32), (3, 7, 5)])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_output_error_matches_the_oracle_in_any_order(image: tuple[int, ...], scale: float) -> None:
    fresh = normal(1, (3, *image))
    guess = fresh + np.float32(scale) * normal(2, fresh.shape)
    found = output_error(guess, fresh)
    np.testing.assert_allclose(found, oracle.output_error(guess, fresh), rtol=1e-5, atol=1e-7)
    assert (found == 0).all() == (scale == 0)
    np.testing.assert_array_equal(output_error(guess, fresh, seed=1), found)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20, 1e30])
def test_an_output_that_is_no_number_is_no_perfect_prediction(bad: float) -> None:
    """Not even where only the sum of its squares overflows: x/inf = 0."""
    fresh = normal(1, (2, 1, 5, 5))
    fresh[1, 0, 2, 2] = bad
    found = output_error(fresh * np.float32(1 - 1e-6), fresh)
    assert np.isfinite(found[0]) and not np.isfinite(found[1])
