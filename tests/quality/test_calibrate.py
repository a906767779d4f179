"""Calibration measures what really happens: its figures are those of runs through the ordinary loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.calibration import calibration_from_json
from adacorr_deploy.caching.decisions import Action, Prediction, SlotHistory
from adacorr_deploy.caching.polynomials import polynomial_coefficients
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.scores import robust_score
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.plugins import oracle
from adacorr_deploy.quality.calibrate import CALIBRATION_SEED, CalibrationOptions, calibrate
from adacorr_deploy.runtime import Pipeline, SampleRequest
from tests.quality.calibrating import GUIDANCE, IMAGES, PREDICTORS, REVISED, STEPS, Calibrate, both_predictors, options
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import Script

REQUEST = SampleRequest((0, 1), steps=STEPS, guidance=GUIDANCE, seed=CALIBRATION_SEED)
RTOL = 2e-3  # errors are small differences of float32 latents; the two sides add up in another order


@dataclass
class SkipsAfter(Script):
    """Evaluates all but `count` steps from `first` on, and predicts from evaluations `gap` apart, as calibration does.

    The slots keep the three last evaluations, so that a gap of two can be had from a run that skipped nothing before.
    """

    first: int = 0
    count: int = 0
    gap: int = 1

    def __post_init__(self) -> None:
        self.choose = lambda step, block: (
            Action.REUSE if self.first <= step < self.first + self.count else Action.EVALUATE
        )

    def prediction(self, step: int, block: int, history: SlotHistory) -> Prediction:
        nodes = history.steps[0], history.steps[self.gap]
        newest, oldest = polynomial_coefficients(step, nodes)
        coefficients = [newest, *[0.0] * (self.gap - 1), oldest]
        return Prediction(coefficients=tuple(coefficients), gate_steps=(step,) * len(coefficients))

    def measures_error(self, step: int, block: int, history: SlotHistory) -> bool:
        return self.measures and len(history.steps) > self.gap


def final_latents(pipeline: Pipeline, script: Script, sampler: Sampler) -> NDArray[np.float64]:
    return pipeline.sample(replace(REQUEST, sampler=sampler), script, history=3).latents.astype(np.float64)


def skipping_error(
    pipeline: Pipeline, predictor: Predictor, *, first: int, count: int, gap: int, sampler: Sampler = Sampler.DDIM
) -> float:
    """Geometric mean over images of the final latents' squared error, by running with and without the skip."""
    whole = predictor.whole_step
    exact = final_latents(pipeline, SkipsAfter(whole_steps=whole), sampler)
    skipping = SkipsAfter(first=first, count=count, gap=gap, whole_steps=whole, revision=predictor.revision)
    strayed = final_latents(pipeline, skipping, sampler)
    return math.exp(np.log(np.square(strayed - exact).reshape(IMAGES, -1).mean(axis=1)).mean())


@both_predictors
@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_skipping_the_last_steps_costs_what_it_really_does(
    pipeline: Pipeline, calibrated: Calibrate, predictor: Predictor, count: int, gap: int
) -> None:
    *fewer, cost = calibrated(predictor).skip_costs[STEPS - count][gap - 1][:count]
    assert cost > 1e-10  # far above the floor, or there would be nothing to compare
    expected = skipping_error(pipeline, predictor, first=STEPS - count, count=count, gap=gap)
    assert cost == pytest.approx(max(expected, *fewer[-1:], 0.0), rel=RTOL)


@both_predictors
def test_skipping_one_more_step_never_costs_less(calibrated: Calibrate, predictor: Predictor) -> None:
    """The planner adds up what each further step costs. As measured, a step may undo some of an error by chance."""
    costs = np.asarray(calibrated(predictor).skip_costs)
    assert (costs[..., 1:] >= costs[..., :-1]).all()
    assert np.isfinite(costs).any(axis=-1).sum() > STEPS  # there is something to compare


def test_of_a_long_run_the_rest_is_measured_at_few_steps(pipeline: Pipeline, backend: FakeBackend) -> None:
    """At every third, evaluations would grow with the square of the steps: 1000 would take a day."""
    steps = 90
    calibrate(pipeline, CalibrationOptions(steps=steps, guidance=1.0, images=1, predictor=PREDICTORS[1]))
    blocks = sum(part == "block_00" for part in backend.order)
    assert blocks == 2 * steps + sum(
        steps - start for start in (*range(5, steps, 5), steps - 2, steps - 1) if start > 4
    )


@both_predictors
@pytest.mark.parametrize("end", [6, 9, 10, 11])
def test_where_the_rest_of_the_run_was_measured_a_skip_costs_what_it_really_does(
    pipeline: Pipeline, calibrated: Calibrate, predictor: Predictor, end: int
) -> None:
    """Gains are measured for two skipped steps at a gap of two that end at every third step, and near the end."""
    cost = calibrated(predictor).skip_costs[end - 2][1][1]
    assert cost == pytest.approx(skipping_error(pipeline, predictor, first=end - 2, count=2, gap=2), rel=RTOL)


@both_predictors
@pytest.mark.parametrize("end", [6, 9, STEPS])
def test_a_multistep_samplers_skips_cost_what_they_really_do(
    pipeline: Pipeline, predictor: Predictor, end: int
) -> None:
    """A step is run again with what was carried to it, and a skipped one hands on what it carries itself."""
    sampler = Sampler.DPMPP_2M
    cost = calibrate(pipeline, replace(options(predictor), sampler=sampler)).skip_costs[end - 2][1][1]
    really = skipping_error(pipeline, predictor, first=end - 2, count=2, gap=2, sampler=sampler)
    assert cost == pytest.approx(really, rel=RTOL)


@pytest.mark.parametrize("sampler", [Sampler.DDIM, Sampler.DPMPP_2M])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_revised_skip_costs_what_is_left_after_the_evaluation_that_revises_it(
    pipeline: Pipeline, count: int, sampler: Sampler
) -> None:
    """Of a skip before the last step nothing is interpolated: its revision is the end of the run."""
    first = STEPS - 1 - count
    found = calibrate(pipeline, replace(options(REVISED), sampler=sampler)).skip_costs[first][0]
    really = skipping_error(pipeline, REVISED, first=first, count=count, gap=1, sampler=sampler)
    assert found[count - 1] == pytest.approx(max(really, *found[: count - 1], 0.0), rel=RTOL)
    unrevised = replace(options(PREDICTORS[1]), sampler=sampler)
    assert found[0] != calibrate(pipeline, unrevised).skip_costs[first][0][0]


@pytest.mark.parametrize(("first", "count"), [(2, 1), (3, 3), (6, 1), (7, 4)])
def test_elsewhere_a_revised_skips_cost_is_within_an_order_of_magnitude(
    pipeline: Pipeline, calibrated: Calibrate, first: int, count: int
) -> None:
    really = skipping_error(pipeline, REVISED, first=first, count=count, gap=1)
    assert really / 10 < calibrated(REVISED).skip_costs[first][0][count - 1] < really * 10


@both_predictors
@pytest.mark.parametrize(("first", "count", "gap"), [(2, 1, 1), (3, 3, 1), (5, 2, 2), (6, 1, 2), (7, 4, 1)])
def test_elsewhere_it_is_within_an_order_of_magnitude(
    pipeline: Pipeline, calibrated: Calibrate, predictor: Predictor, first: int, count: int, gap: int
) -> None:
    cost = calibrated(predictor).skip_costs[first][gap - 1][count - 1]
    really = skipping_error(pipeline, predictor, first=first, count=count, gap=gap)
    assert really / 10 < cost < really * 10


@pytest.mark.parametrize(
    "predictor",
    [*PREDICTORS, Predictor(kind=PredictorKind.HOLD), Predictor(order=2)],
    ids=lambda predictor: predictor.label,
)
def test_costs_are_infinite_exactly_where_evaluations_or_steps_are_missing(
    calibrated: Calibrate, predictor: Predictor
) -> None:
    costs, expected = calibrated(predictor).skip_costs, calibrated(predictor).probe.expected
    back = predictor.history - 1  # gaps before the last evaluation
    for step in range(STEPS):
        for gap in range(1, 7):
            for count in range(1, 7):
                enough = step > 0 and step - 1 - back * gap >= 0
                assert math.isfinite(costs[step][gap - 1][count - 1]) == (enough and step + count <= STEPS)
                assert (expected[step][gap - 1][count - 1] > 0) == (step - count - back * gap >= 0)


@both_predictors
@pytest.mark.parametrize("gap", [1, 2])
def test_the_probes_expectation_is_what_a_request_measures(
    pipeline: Pipeline, predictor: Predictor, gap: int, calibrated: Calibrate
) -> None:
    """One image at a time, since the loop sums up a batch: what it hands the controller is one image's error."""
    probe = calibrated(predictor).probe
    measured = []
    images = pipeline.sample(REQUEST, Script(), history=0)  # only to see that both images are the calibration's
    for image, label in enumerate(REQUEST.labels):
        alone = initial_latents(image)
        script = SkipsAfter(gap=gap, whole_steps=predictor.whole_step, measures=True)
        request = SampleRequest((label,), steps=STEPS, guidance=GUIDANCE, latents=alone)
        result = pipeline.sample(request, script, history=3)
        np.testing.assert_allclose(result.latents[0], images.latents[image], rtol=1e-4, atol=1e-5)
        measured.append([script.errors[step, probe.block] for step in range(gap + 1, STEPS)])
    means = np.exp(np.log(measured).mean(axis=0))
    expected = [probe.expected[step][gap - 1][0] for step in range(gap + 1, STEPS)]
    np.testing.assert_allclose(expected, means, rtol=RTOL)


def initial_latents(image: int) -> NDArray[np.float32]:
    """An image's own first draw, (1, C, H, W), written down without the request's stream."""
    return oracle.philox_normals(CALIBRATION_SEED, image, 0, 16).reshape(1, 1, 4, 4)


@both_predictors
def test_a_farther_probe_is_worse(calibrated: Calibrate, predictor: Predictor) -> None:
    """The error of an extrapolation grows with the distance: averaged over steps, as single ones may cross zero."""
    cube = np.asarray(calibrated(predictor).probe.expected)[8:, 0, :6]
    growth = np.exp(np.log(cube[:, 1:] / cube[:, :-1]).mean(axis=0))
    assert (growth > 1).all()


@both_predictors
def test_offsets_are_those_of_the_input_so_many_steps_before(
    pipeline: Pipeline, calibrated: Calibrate, predictor: Predictor
) -> None:
    """Upstream overwrites the previous input before it compares: its offset is always 0."""
    limits = np.asarray(calibrated(predictor).offset_limits)
    ages = np.arange(1, 7)[None, :]
    reachable = ages <= np.arange(STEPS)[:, None]
    assert (limits[reachable] > 0).all()
    assert (limits[~reachable] == 0).all()
    if predictor.whole_step:
        return  # the first block's inputs do not depend on the predictor
    script = SkipsAfter(wants_signals=True)
    final_latents(pipeline, script, Sampler.DDIM)
    for step in range(1, STEPS):  # the loop sums a branch up over its images, calibration takes the largest image
        seen = max(robust_score(branch) for branch in script.signals[step, 0])
        assert 0.99 * seen <= limits[step, 0] <= 2 * seen


def test_measuring_again_gives_the_same_bytes_and_progress_reaches_its_end(
    pipeline: Pipeline, calibrated: Calibrate
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    again = calibrate(pipeline, options(), lambda phase, done, total: told.setdefault(phase, []).append((done, total)))
    assert again.model_dump_json() == calibrated(PREDICTORS[0]).model_dump_json()
    assert len(told) == 2
    for calls in told.values():
        assert calls == [(done, STEPS) for done in range(STEPS + 1)]


@both_predictors
def test_what_is_stored_is_read_back_with_its_infinite_costs(calibrated: Calibrate, predictor: Predictor) -> None:
    calibration = calibrated(predictor)
    assert calibration_from_json(calibration.model_dump_json(), where="here") == calibration
    assert calibration.predictor == predictor
    assert (calibration.images, calibration.key.steps, calibration.key.guidance) == (IMAGES, STEPS, GUIDANCE)


@both_predictors
def test_without_guidance_there_is_one_branch(pipeline: Pipeline, predictor: Predictor) -> None:
    calibration = calibrate(pipeline, CalibrationOptions(steps=6, guidance=1.0, images=1, predictor=predictor))
    assert calibration.key.guidance == 1.0
    assert math.isfinite(calibration.skip_costs[2][0][3])
