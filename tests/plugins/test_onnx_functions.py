"""The ONNX functions, run by ONNX Runtime, against the NumPy oracle and the invariants of METHOD §2 and §3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.core.specs import DType, ModelSpec
from adacorr_deploy.plugins import oracle, service_part_specs
from tests.models import model_spec as any_model_spec
from tests.plugins.service_models import PRECISIONS, model_spec, run

Inputs = dict[str, Any]  # arrays of several dtypes
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
TOLERANCE = {DType.FLOAT32: 2e-5, DType.FLOAT16: 4e-3}  # of the largest term of a sum: rounding in p
seeds, rows_of_a_batch = st.integers(0, 2**32 - 1), st.integers(1, 4)
token_counts = st.sampled_from([1, 7, 49])
precisions = st.sampled_from(PRECISIONS)


def noise(seed: int, *shape: int, precision: DType = DType.FLOAT32) -> NDArray[np.floating]:
    return np.random.default_rng(seed).standard_normal(shape).astype(precision.numpy)


def signals_of(tokens: NDArray[np.floating], reference: NDArray[np.floating]) -> NDArray[np.floating]:
    model = model_spec(tokens=tokens.shape[1], width=tokens.shape[2], precision=DType.from_numpy(tokens.dtype))
    return run(model, "signals", tokens=tokens, reference=reference)[0]


def history_inputs(model: ModelSpec, seed: int, *, rows: int, evaluations: int, steps: int = 5) -> Inputs:
    rng = np.random.default_rng(seed)
    units, p = model.units[0], model.precision.numpy
    shape = (rows, model.tokens, model.width)
    return {
        "history": rng.standard_normal((evaluations, units, *shape)).astype(p),
        "modulation": rng.standard_normal((steps, rows, 3 * units, model.width)).astype(p),
        "gate_steps": rng.integers(0, steps, evaluations),
        "coefficients": rng.uniform(-2, 3, evaluations).astype(np.float32),
    }


def blend_inputs(model: ModelSpec, estimate: list[float], *, evaluations: int = 2) -> Inputs:
    rows = len(estimate)
    return {
        "base": noise(1, rows, model.tokens, model.width, precision=model.precision),
        **history_inputs(model, 2, rows=rows, evaluations=evaluations),
        "fresh": noise(3, rows, model.tokens, model.width, precision=model.precision),
        "estimate": np.array(estimate, np.float32),
        "thresholds": np.array([0.1, 0.3, 1.0], np.float32),
    }


# --- signals ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(
    seed=seeds,
    rows=rows_of_a_batch,
    tokens=token_counts,
    precision=precisions,
    size=st.sampled_from([1e-2, 1.0, 100.0]),
    change=st.sampled_from([1e-2, 0.3, 3.0]),
)
def test_signals_match_the_oracle(
    seed: int, rows: int, tokens: int, precision: DType, size: float, change: float
) -> None:
    reference = (size * noise(seed, rows, tokens, 16)).astype(precision.numpy)
    current = (reference + size * change * noise(seed + 1, rows, tokens, 16)).astype(precision.numpy)
    found, expected = signals_of(current, reference), oracle.signals(current, reference)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * (1 + size))


@EXAMPLES
@given(seed=seeds, rows=rows_of_a_batch, tokens=token_counts, precision=precisions, zeros=st.booleans())
def test_nothing_changed_gives_no_change(seed: int, rows: int, tokens: int, precision: DType, zeros: bool) -> None:
    current = noise(seed, rows, tokens, 16, precision=precision) * (0 if zeros else 1)
    np.testing.assert_array_equal(signals_of(current, current.copy())[:, :4], 0)


@EXAMPLES
@given(seed=seeds, precision=precisions, tokens=token_counts, size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_smallest_change_of_an_input_is_seen(seed: int, precision: DType, tokens: int, size: float) -> None:
    """The released code compared the input with itself, so its temporal signal was always 0 (METHOD §2)."""
    rng = np.random.default_rng(seed)
    reference = (size * rng.standard_normal((1, tokens, 16))).astype(precision.numpy)
    current = reference.copy()
    place = (0, int(rng.integers(tokens)), int(rng.integers(16)))
    current[place] = np.nextafter(current[place], np.array(np.inf, precision.numpy))
    found = signals_of(current, reference)
    assert found[0, 3] > 0, "paper_temporal"
    assert found[0, 0] > 0, "relative_offset"


@EXAMPLES
@given(seed=seeds, exponent=st.integers(-6, 20))
def test_relative_signals_do_not_depend_on_the_scale(seed: int, exponent: int) -> None:
    reference = noise(seed, 2, 7, 16)
    current = reference + np.float32(0.1) * noise(seed + 1, 2, 7, 16)
    scale = np.float32(2.0**exponent)
    plain, scaled = signals_of(current, reference), signals_of(scale * current, scale * reference)
    np.testing.assert_allclose(scaled[:, :3], plain[:, :3], rtol=1e-3, atol=1e-6)  # ε is not scaled: 1e-6·2⁶ of a norm
    np.testing.assert_allclose(scaled[:, 3:7], scale * plain[:, 3:7], rtol=1e-4)
    np.testing.assert_allclose(scaled[:, 7:], scale**2 * plain[:, 7:], rtol=1e-4)


@EXAMPLES
@given(
    seed=seeds,
    precision=precisions,
    tokens=token_counts,
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    where=st.sampled_from(["tokens", "reference", "both"]),
)
def test_a_bad_number_anywhere_makes_its_row_not_finite(
    seed: int, precision: DType, tokens: int, bad: float, where: str
) -> None:
    rng = np.random.default_rng(seed)
    inputs = {name: noise(seed + 1, 2, tokens, 16, precision=precision) for name in ("tokens", "reference")}
    place = (1, int(rng.integers(tokens)), int(rng.integers(16)))
    for name in inputs if where == "both" else [where]:
        inputs[name][place] = bad
    found = signals_of(**inputs)
    assert not np.isfinite(found[1, 0])
    assert np.isfinite(found[0]).all(), "the other row is untouched"


@pytest.mark.parametrize("size", [1e18, 1e19, 1e20, 1e30, 3e38])
@pytest.mark.parametrize("change", [1e-6, 1e-3, 0.5])
def test_huge_values_give_the_truth_or_no_number(size: float, change: float) -> None:
    """x/inf = 0 must not pass for "nothing changed"."""
    reference = np.full((1, 7, 16), size, np.float32)
    current = reference * np.float32(1 - change)
    found, expected = signals_of(current, reference)[0, 0], oracle.signals(current, reference)[0, 0]
    assert not np.isfinite(found) or found == pytest.approx(expected, rel=1e-3)


def test_largest_float16_values_do_not_overflow() -> None:
    reference = np.full((1, 7, 16), 65504, np.float16)
    found = signals_of(-reference, reference)
    np.testing.assert_allclose(found[0, :4], [2, 2, 0, 2 * 65504 * 4], rtol=1e-5)


# --- predict ---------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(
    seed=seeds,
    rows=rows_of_a_batch,
    tokens=token_counts,
    evaluations=st.integers(1, 3),
    units=st.sampled_from([1, 2, 4]),
    precision=precisions,
)
def test_predict_matches_the_oracle(
    seed: int, rows: int, tokens: int, evaluations: int, units: int, precision: DType
) -> None:
    model = model_spec(tokens=tokens, units=(units,), precision=precision)
    x = noise(seed, rows, tokens, model.width, precision=precision)
    inputs = history_inputs(model, seed + 1, rows=rows, evaluations=evaluations)
    (found,) = run(model, f"predict_{evaluations}", tokens=x, **inputs)
    expected = oracle.predict(x, **inputs)
    assert found.dtype == precision.numpy
    np.testing.assert_allclose(found, expected, rtol=0, atol=40 * TOLERANCE[precision])  # terms of up to about 40


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_empty_history_predicts_the_input_itself(precision: DType) -> None:
    model = model_spec(precision=precision)
    x = noise(0, 2, model.tokens, model.width, precision=precision)
    inputs = history_inputs(model, 1, rows=2, evaluations=2)
    inputs["history"] = np.zeros_like(inputs["history"])
    np.testing.assert_array_equal(run(model, "predict_2", tokens=x, **inputs)[0], x)


def test_rows_of_a_batch_do_not_mix() -> None:
    model = model_spec()
    x = noise(0, 3, model.tokens, model.width)
    inputs = history_inputs(model, 1, rows=3, evaluations=2)
    before = run(model, "predict_2", tokens=x, **inputs)[0]
    inputs["history"][:, :, 1] = np.nan
    after = run(model, "predict_2", tokens=x, **inputs)[0]
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert np.isnan(after[1]).all()


# --- blend -----------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(
    estimate=st.lists(st.floats(0, 0.5, width=32), min_size=1, max_size=4),
    evaluations=st.integers(1, 3),
    units=st.sampled_from([1, 2, 4]),
    precision=precisions,
)
def test_blend_matches_the_oracle(estimate: list[float], evaluations: int, units: int, precision: DType) -> None:
    model = model_spec(units=(units,), precision=precision)
    inputs = blend_inputs(model, estimate, evaluations=evaluations)
    tokens_out, weight = run(model, f"blend_{evaluations}", **inputs)
    expected_tokens, expected_weight = oracle.blend(**inputs)
    np.testing.assert_allclose(weight, expected_weight, atol=1e-5)
    np.testing.assert_allclose(tokens_out, expected_tokens, rtol=0, atol=40 * TOLERANCE[precision])


@EXAMPLES
@given(
    low=st.floats(width=32),
    high=st.floats(width=32),
    reuse=st.floats(0, 1, width=32),
    width=st.floats(2**-10, 1, width=32),
    gain=st.floats(2**-7, 100, width=32),
)
def test_weight_is_in_range_and_grows_with_the_estimate(
    low: float, high: float, reuse: float, width: float, gain: float
) -> None:
    model = model_spec(tokens=1)
    inputs = blend_inputs(model, [low, high])
    inputs["thresholds"] = np.array([reuse, reuse + width, gain], np.float32)
    weight = run(model, "blend_2", **inputs)[1]
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight[~np.isfinite([low, high])] == 1).all()
    if np.isfinite(low) and np.isfinite(high):
        assert (weight[0] <= weight[1]) if low <= high else (weight[0] >= weight[1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weight_zero_is_the_prediction_and_weight_one_the_fresh_output_bit_for_bit(precision: DType) -> None:
    model = model_spec(precision=precision)
    inputs = blend_inputs(model, [0.0, 0.1, 0.3, 9.0, np.nan, np.inf, -np.inf])
    tokens_out, weight = run(model, "blend_2", **inputs)
    slot = {name: inputs[name] for name in ("history", "modulation", "gate_steps", "coefficients")}
    (predicted,) = run(model, "predict_2", tokens=inputs["base"], **slot)
    np.testing.assert_array_equal(weight, [0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(tokens_out[:2], predicted[:2])
    np.testing.assert_array_equal(tokens_out[2:], inputs["fresh"][2:])


def test_a_spoilt_slot_does_not_survive_its_recomputation() -> None:
    model = model_spec()
    inputs = blend_inputs(model, [np.nan, 0.0])
    inputs["history"][:, :, 0] = np.nan
    inputs["fresh"][1] = np.inf
    tokens_out, _ = run(model, "blend_2", **inputs)
    np.testing.assert_array_equal(tokens_out[0], inputs["fresh"][0])
    assert np.isfinite(tokens_out[1]).all()


def test_thresholds_that_give_no_number_recompute() -> None:
    model = model_spec()
    inputs = blend_inputs(model, [0.05, 0.2])
    inputs["thresholds"] = np.array([np.nan, 0.3, 1.0], np.float32)
    np.testing.assert_array_equal(run(model, "blend_2", **inputs)[1], 1)


# --- spans ------------------------------------------------------------------------------------------------------------


def residual_inputs(model: ModelSpec, seed: int, *, rows: int, evaluations: int) -> Inputs:
    rng, shape = np.random.default_rng(seed), (rows, model.tokens, model.width)
    return {
        "base": rng.standard_normal(shape).astype(model.precision.numpy),
        "history": rng.standard_normal((evaluations, 1, *shape)).astype(model.precision.numpy),
        "coefficients": rng.uniform(-2, 3, evaluations).astype(np.float32),
        "scale": rng.uniform(0.5, 1.5, model.width).astype(np.float32),
        "shift": rng.uniform(-0.5, 0.5, model.width).astype(np.float32),
    }


@EXAMPLES
@given(seed=seeds, rows=rows_of_a_batch, tokens=token_counts, evaluations=st.integers(1, 3), precision=precisions)
def test_combine_matches_the_oracle(seed: int, rows: int, tokens: int, evaluations: int, precision: DType) -> None:
    model = model_spec(tokens=tokens, precision=precision)
    inputs = residual_inputs(model, seed, rows=rows, evaluations=evaluations)
    (found,) = run(model, f"combine_{evaluations}", **inputs)
    assert found.dtype == precision.numpy
    np.testing.assert_allclose(found, oracle.combine(**inputs), rtol=0, atol=40 * TOLERANCE[precision])


@EXAMPLES
@given(seed=seeds, precision=precisions)
def test_combine_makes_a_residual_and_gives_it_back_exactly(seed: int, precision: DType) -> None:
    """What a span keeps is fl(y − x); what stands for it later is fl(x' + that), not one rounding more."""
    model, ones, zeros = model_spec(precision=precision), np.ones(8, np.float32), np.zeros(8, np.float32)
    x, y, later = (noise(seed + i, 2, model.tokens, model.width, precision=precision) for i in range(3))
    affine: Inputs = {"scale": ones, "shift": zeros}
    (kept,) = run(model, "combine_1", base=y, history=x[None, None], coefficients=-ones[:1], **affine)
    np.testing.assert_array_equal(kept, y - x)
    (reused,) = run(model, "combine_1", base=later, history=kept[None, None], coefficients=ones[:1], **affine)
    np.testing.assert_array_equal(reused, later + (y - x))


@EXAMPLES
@given(
    seed=seeds,
    rows=rows_of_a_batch,
    tokens=token_counts,
    units=st.sampled_from([1, 2, 4]),
    precision=precisions,
    size=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_modulated_and_its_probe_match_the_oracle(
    seed: int, rows: int, tokens: int, units: int, precision: DType, size: float
) -> None:
    model = model_spec(tokens=tokens, width=16, units=(units,), precision=precision)
    rng = np.random.default_rng(seed)
    inputs = {
        "tokens": (size * noise(seed, rows, tokens, 16) + 2).astype(precision.numpy),
        "modulation": noise(seed + 1, 4, rows, 3 * units, 16, precision=precision),
        "step": rng.integers(0, 4, 1),
    }
    probing: Inputs = {"weights": noise(seed + 2, 16), "bias": noise(seed + 3, 1)}
    (found,) = run(model, "modulated", **inputs)
    expected = oracle.modulated(**inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=10 * TOLERANCE[precision] + 1e-3 * (size > 1))
    (probed,) = run(model, "probe", **inputs, **probing)
    tolerance = 100 * TOLERANCE[precision]  # a sum over 16 channels, of terms of up to about 6
    np.testing.assert_allclose(probed, oracle.probe(**inputs, **probing), rtol=0, atol=tolerance)


# --- whole steps -----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(seed=seeds, batch=rows_of_a_batch, evaluations=st.integers(1, 3))
def test_extrapolate_follows_the_oracle(seed: int, batch: int, evaluations: int) -> None:
    rng = np.random.default_rng(seed)
    image = (batch, 1, 7, 1)
    inputs = {
        "latents": rng.standard_normal(image).astype(np.float32),
        "history": rng.standard_normal((evaluations, 1, *image)).astype(np.float32),
        "factors": rng.uniform(-2, 3, evaluations).astype(np.float32),
        "noise": rng.standard_normal(image).astype(np.float32),
        "carried": rng.standard_normal(image).astype(np.float32),
    }
    table, step = rng.standard_normal((5, 8)).astype(np.float32), int(rng.integers(5))
    actual = run(
        model_spec(), f"extrapolate_{evaluations}", **inputs, coefficients=table, step=np.array([step], np.int64)
    )
    expected = oracle.extrapolate(**inputs, sampler_row=table[step])
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@EXAMPLES
@given(seed=seeds, batch=rows_of_a_batch, scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
def test_output_error_follows_the_oracle_and_is_0_for_equal_outputs(seed: int, batch: int, scale: float) -> None:
    fresh = noise(seed, batch, 1, 7, 1)
    predicted = (fresh + scale * noise(seed + 1, batch, 1, 7, 1)).astype(np.float32)
    (error,) = run(model_spec(), "output_error", predicted=predicted, fresh=fresh)
    np.testing.assert_allclose(error, oracle.output_error(predicted, fresh), rtol=1e-4, atol=1e-7)
    assert (error == 0).all() == (scale == 0)


# --- motion ----------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(seed=seeds, rows=rows_of_a_batch, frames=st.sampled_from([2, 5]), precision=precisions, varying=st.booleans())
def test_motion_follows_the_oracle_frame_by_frame(
    seed: int, rows: int, frames: int, precision: DType, varying: bool
) -> None:
    """Tokens stand frame by frame; a clip whose length may vary has as many frames as positions."""
    fixed = any_model_spec(latent_shape=(1, 5 if varying else frames, 2, 3), patch=(1, 1, 1), precision=precision)
    model = replace(fixed, latents=replace(fixed.latents, largest=(9, 2, 3), smallest=(2, 2, 3))) if varying else fixed
    tokens = noise(seed, rows, frames * 6, model.width, precision=precision)
    positions = np.arange(frames, dtype=np.float32)
    (motion,) = run(model, "motion", tokens=tokens, frame_positions=positions)
    expected = oracle.motion(tokens.reshape(rows, frames, -1))
    np.testing.assert_allclose(motion, expected, rtol=1e-4)
    by_row = tokens.astype(np.float64).reshape(rows, frames, -1)
    change = np.abs(np.diff(by_row, axis=1)).sum(axis=(1, 2))
    sizes = np.abs(by_row).sum(axis=2)
    np.testing.assert_allclose(expected, change / (sizes[:, 1:] + sizes[:, :-1]).sum(axis=1), rtol=1e-5)


def test_what_stands_still_does_not_move_and_what_turns_over_moves_most() -> None:
    model = any_model_spec(latent_shape=(1, 4, 1, 1), patch=(1, 1, 1))
    still = np.repeat(noise(0, 1, 1, model.width), 4, axis=1)
    turning = still * np.array([1, -1, 1, -1], np.float32)[None, :, None]
    positions = np.arange(4, dtype=np.float32)
    found = [run(model, "motion", tokens=each, frame_positions=positions)[0][0] for each in (still, turning, 0 * still)]
    np.testing.assert_allclose(found, [0, 1, 0], atol=1e-6)


def test_a_model_of_images_has_no_motion() -> None:
    assert "motion" not in service_part_specs(model_spec())
