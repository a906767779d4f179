"""A profile holds what its formulas say of the runs as they really are: the oracle writes them down step by step."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.profile import Profile, Quantity, check_profile, profile_from_json
from adacorr_deploy.core.errors import CalibrationError, RequestError
from adacorr_deploy.core.samplers import Sampler, sampler_table
from adacorr_deploy.quality import memory_need
from adacorr_deploy.quality import profile as profile_module
from adacorr_deploy.quality.calibrate import CALIBRATION_SEED
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.profile import ProfileOptions, profile
from adacorr_deploy.quality.profile_quantities import (
    AFFINE_AGES,
    MAX_AGE,
    AffineSums,
    RunShape,
    StepView,
    affine_maps,
    logistic_fit,
    polynomial_fit,
)
from adacorr_deploy.runtime import Pipeline, SampleRequest
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import PlainRun, Script
from tests.runtime.tiny_dit import SCHEDULE, UNITS, WIDTH, TinyDiT

STEPS, IMAGES, GUIDANCE = 8, 2, 3.0
OPTIONS = ProfileOptions(steps=STEPS, guidance=GUIDANCE, images=IMAGES)
PARTS = len(UNITS)

Array = NDArray[np.float64]
Pairs = list[tuple[Array, Array]]  # what a span adds now, and what it added before


@pytest.fixture(scope="module")
def measured(pipeline: Pipeline) -> Profile:
    return profile(pipeline, OPTIONS)


@pytest.fixture(scope="module")
def plain() -> PlainRun:
    """The same run, written down with nothing but lists."""
    request = SampleRequest((0, 1), steps=STEPS, guidance=GUIDANCE, seed=CALIBRATION_SEED)
    run = PlainRun(model=TinyDiT(), request=request, script=Script(), history=1)
    run.latents()
    return run


def residual(plain: PlainRun, step: int, first: int, stop: int) -> Array:
    return np.asarray(plain.outputs[step, stop - 1], np.float64) - plain.inputs[step, first]


def size(values: Array) -> Array:
    """Mean absolute value of each row."""
    return np.asarray(np.abs(values).mean(axis=(1, 2)))


def test_magnitude_ratios_are_those_of_all_blocks_residuals(measured: Profile, plain: PlainRun) -> None:
    assert measured.magnitude_ratios is not None
    assert measured.magnitude_ratios[0] == 1.0
    for step in range(1, STEPS):
        now, before = (np.linalg.norm(residual(plain, at, 0, PARTS), axis=2) for at in (step, step - 1))
        assert measured.magnitude_ratios[step] == pytest.approx((now / before).mean(), rel=1e-4)


def test_part_errors_are_relative_to_what_the_part_adds_now(measured: Profile, plain: PlainRun) -> None:
    assert measured.part_errors is not None
    for part, step, age in itertools.product(range(PARTS), range(STEPS), range(1, MAX_AGE + 1)):
        found = measured.part_errors[part][step][age - 1]
        if age > step:
            assert found == np.inf
        else:
            now, before = (residual(plain, at, part, part + 1) for at in (step, step - age))
            assert found == pytest.approx((size(now - before) / size(now)).mean(), rel=1e-3)


def test_unit_errors_are_means_over_the_depth_of_results_before_their_gates(pipeline: Pipeline) -> None:
    """The oracle computes the units again from the inputs that it noted."""
    one = profile(pipeline, ProfileOptions(steps=4, guidance=1.0, images=1))
    model = TinyDiT()
    request = SampleRequest((0,), steps=4, guidance=1.0, seed=CALIBRATION_SEED)
    run = PlainRun(model=model, request=request, script=Script(), history=1)
    run.latents()
    table = sampler_table(SCHEDULE, Sampler.DDIM, 4)
    tables = model.condition({"timesteps": table.timesteps, "labels": request.rows(3)})
    errors: dict[str, list[float]] = {"attention": [], "mlp": []}
    for part, units in enumerate(UNITS):
        now, before = (
            model.block(
                part,
                {
                    "tokens": run.inputs[step, part],
                    "modulation": tables[f"modulation_{part:02d}"],
                    "step": np.asarray([step]),
                },
            )
            for step in (3, 1)
        )
        for kind, block in itertools.product(errors, range(units // 2)):
            fresh, kept = (np.asarray(units[f"{kind}_{block}"], np.float64) for units in (now, before))
            errors[kind].append(float((size(fresh - kept) / size(fresh)).mean()))
    assert one.unit_errors is not None
    assert one.unit_errors["attention"][3][1] == pytest.approx(np.mean(errors["attention"]), rel=1e-3)
    assert one.unit_errors["mlp"][3][1] == pytest.approx(np.mean(errors["mlp"]), rel=1e-3)
    assert one.unit_errors["mlp"][1][1] == np.inf  # before the first step


def test_affine_maps_leave_less_error_than_holding_or_any_map_nearby(measured: Profile, plain: PlainRun) -> None:
    assert measured.affine is not None
    assert [(each.first, each.stop) for each in measured.affine] == [(0, 1), (1, 2), (2, 3), (0, 3), (1, 3)]
    for each in measured.affine:
        pairs = [
            (residual(plain, step, each.first, each.stop), residual(plain, step - age, each.first, each.stop))
            for step in range(STEPS)
            for age in range(1, AFFINE_AGES + 1)
            if age <= step
        ]
        weights = np.asarray([1 / np.square(fresh - kept).mean() for fresh, kept in pairs])
        scale, shift = np.asarray(each.scale), np.asarray(each.shift)

        def error(scale: Array, shift: Array, sides: Pairs = pairs, weights: Array = weights) -> Array:
            apart = [(fresh - scale * kept - shift).reshape(-1, WIDTH) for fresh, kept in sides]
            return np.asarray([weight * squares(each) for weight, each in zip(weights, apart, strict=True)]).sum(axis=0)

        best = error(scale, shift)
        assert (best <= error(np.ones(WIDTH), np.zeros(WIDTH)) * (1 + 1e-6)).all()
        for change in (0.99, 1.01):
            assert (best <= error(change * scale, shift)).all()
            assert (best <= error(scale, change * shift)).all()


def squares(values: Array) -> Array:
    return np.asarray(np.square(values).sum(axis=0))


def test_the_output_polynomial_fits_the_runs_own_changes_best(measured: Profile, plain: PlainRun) -> None:
    """Its squared error over the run's pairs is that of NumPy's own fit."""
    assert measured.output_change is not None
    x, y = output_pairs(plain)
    ours = np.square([measured.output_change.at(value) for value in x] - y).sum()
    theirs = np.square(np.polyval(np.polyfit(x, y, 4), x) - y).sum()
    assert ours == pytest.approx(theirs, rel=0.05)
    assert (measured.output_change.low, measured.output_change.high) == pytest.approx((x.min(), x.max()), rel=1e-4)


def output_pairs(plain: PlainRun) -> tuple[Array, Array]:
    table = sampler_table(SCHEDULE, Sampler.DDIM, STEPS)
    rows = plain.model.condition({"timesteps": table.timesteps, "labels": plain.request.rows(3)})["modulation_00"]
    inputs, outputs = [], []
    for step in range(STEPS):
        tokens = np.asarray(plain.inputs[step, 0], np.float64)
        normal = (tokens - tokens.mean(axis=2, keepdims=True)) / np.sqrt(tokens.var(axis=2, keepdims=True) + 1e-6)
        shift, scale = (np.asarray(rows[step, :, row, None], np.float64) for row in (0, 1))
        inputs.append(normal * (1 + scale) + shift)
        outputs.append(np.asarray(plain.outputs[step, PARTS - 1], np.float64))
    return relative_changes(inputs), relative_changes(outputs)


def relative_changes(values: list[Array]) -> Array:
    return np.concatenate([size(now - before) / size(before) for before, now in itertools.pairwise(values)])


def test_every_part_has_a_gate_of_the_models_width(measured: Profile) -> None:
    assert measured.gates is not None
    assert [len(gate.weights) for gate in measured.gates] == [WIDTH] * PARTS


# --- The run -----------------------------------------------------------------------------------------------------


def test_measuring_again_gives_the_same_bytes_which_read_back_and_fit_the_bundle(
    pipeline: Pipeline, measured: Profile
) -> None:
    text = profile(pipeline, OPTIONS).model_dump_json()
    assert text == measured.model_dump_json()
    assert profile_from_json(text, where="here") == measured
    check_profile(measured, pipeline.manifest.model, where="here")


def test_only_what_is_asked_for_is_measured(pipeline: Pipeline, measured: Profile) -> None:
    wanted = frozenset({Quantity.MAGNITUDE_RATIOS, Quantity.AFFINE})
    found = profile(pipeline, ProfileOptions(steps=STEPS, guidance=GUIDANCE, images=IMAGES, quantities=wanted))
    assert found.quantities == wanted
    assert (found.magnitude_ratios, found.affine) == (measured.magnitude_ratios, measured.affine)


def test_batches_of_images_add_up_and_each_is_run_once(
    pipeline: Pipeline, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_module, "IMAGES_AT_ONCE", 2)
    told: list[tuple[int, int]] = []
    options = ProfileOptions(steps=5, images=3)
    found = profile(pipeline, options, lambda phase, done, total: told.append((done, total)))
    assert backend.order.count("block_01") == 2 * 5
    assert told[-1] == (10, 10)
    assert found.magnitude_ratios is not None
    fewer = profile(pipeline, ProfileOptions(steps=5, images=2))
    assert fewer.magnitude_ratios != found.magnitude_ratios  # the third image counts


def test_an_interrupted_profile_goes_on_where_it_was_and_is_the_same(
    pipeline: Pipeline, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profile_module, "IMAGES_AT_ONCE", 1)
    options = ProfileOptions(steps=5, images=3)
    whole = profile(pipeline, options)

    def interrupt(phase: str, done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(pipeline, options, interrupt, Partials(tmp_path / "part", {"a": 1}))
    backend.order.clear()
    resumed = profile(pipeline, options, None, Partials(tmp_path / "part", {"a": 1}))
    assert backend.order.count("block_01") == 5  # the third image only
    assert resumed == whole


def test_samplers_that_add_noise_are_profiled_too(pipeline: Pipeline) -> None:
    found = profile(pipeline, ProfileOptions(steps=5, images=1, sampler=Sampler.DDPM))
    assert found.key.sampler == "ddpm"
    assert found.quantities == frozenset(Quantity)


def test_what_can_not_be_measured_is_refused(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationError, match="steps is 3; with fewer than 4"):
        profile(pipeline, ProfileOptions(steps=3))
    with pytest.raises(RequestError, match=r"guidance is 0\.5, allowed"):
        profile(pipeline, ProfileOptions(steps=5, guidance=0.5))
    with pytest.raises(RequestError, match="images is 0, allowed"):
        ProfileOptions(images=0)
    monkeypatch.setattr(memory_need, "available_bytes", lambda: 1000)
    with pytest.raises(RequestError, match=r"Profiling 5 steps on 1 images at once needs .* Lower --images"):
        profile(pipeline, ProfileOptions(steps=5, images=1))


# --- The fits ----------------------------------------------------------------------------------------------------


def test_a_polynomial_is_found_again_from_its_values_and_clamped_outside_them() -> None:
    x = np.linspace(0.01, 0.4, 30)
    exact = (3.0, -2.0, 1.0, 0.5, 0.1)
    found = polynomial_fit(x, np.asarray(np.polyval(exact, x), np.float64))
    np.testing.assert_allclose(found.coefficients, exact, rtol=1e-6)
    assert found.at(0.2) == pytest.approx(float(np.polyval(exact, 0.2)))
    assert (found.at(0.0), found.at(9.0)) == (found.at(0.01), found.at(0.4))


def test_an_affine_map_is_found_again_from_spans_that_follow_it() -> None:
    random = np.random.default_rng(0)
    scale, shift = np.array([2.0, -0.5, 1.0]), np.array([0.1, 0.0, -3.0])
    sums = AffineSums(RunShape(steps=2, parts=1, rows=4, width=3, spans=((0, 1),)))
    base = random.standard_normal((4, 5, 3)).astype(np.float32)
    kept = random.standard_normal((4, 5, 3)).astype(np.float32)
    kept[:, :, 2] = 1.0  # a channel that never varies is held, with the mean difference
    fresh = (scale * kept + shift).astype(np.float32)
    views = [
        StepView(step=step, boundaries=(base, base + added), units=(), modulated=())
        for step, added in enumerate((kept, fresh))
    ]
    sums.see(views[1], (views[0],))
    (found,) = affine_maps(np.asarray(sums.measured()["sums"], np.float64), ((0, 1),))
    np.testing.assert_allclose(found.scale, [2.0, -0.5, 1.0], atol=1e-4)
    np.testing.assert_allclose(found.shift, [0.1, 0.0, -3.0], atol=1e-4)


def test_a_gate_tells_apart_what_one_feature_decides() -> None:
    random = np.random.default_rng(1)
    samples = random.standard_normal((200, 6)) * 5 + 3
    safe = samples[:, 2] > 4
    weights, bias = logistic_fit(samples, safe)
    assert np.mean((samples @ weights + bias > 0) == safe) > 0.95
    assert np.argmax(np.abs(weights)) == 2


@pytest.mark.parametrize("safe", [True, False])
def test_a_gate_of_samples_that_all_agree_is_finite_and_agrees(safe: bool) -> None:
    samples = np.random.default_rng(2).standard_normal((20, 3))
    weights, bias = logistic_fit(samples, np.full(20, safe))
    assert np.isfinite(weights).all()
    assert ((samples @ weights + bias > 0) == safe).all()
