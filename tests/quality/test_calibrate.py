"""Calibration measures what really happens: its figures are those of runs through the ordinary loop."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.calibration import Calibration, calibration_from_json
from adacorr_deploy.caching.decisions import Action, Prediction, SlotHistory
from adacorr_deploy.caching.polynomials import polynomial_coefficients
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.caching.scores import robust_score
from adacorr_deploy.core.errors import CalibrationError, EngineError, RequestError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.plugins import oracle
from adacorr_deploy.quality import memory_need
from adacorr_deploy.quality.calibrate import CALIBRATION_SEED, CalibrationOptions, calibrate, needed_bytes
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.scripted import Script
from tests.runtime.tiny_dit import Part, Tensors, TinyDiT

STEPS, IMAGES, GUIDANCE = 12, 2, 3.0
PREDICTORS = (Predictor(), Predictor(kind=PredictorKind.OUTPUT_TAYLOR))
REVISED = Predictor(kind=PredictorKind.OUTPUT_TAYLOR, revision=Revision.QUADRATIC)
REQUEST = SampleRequest((0, 1), steps=STEPS, guidance=GUIDANCE, seed=CALIBRATION_SEED)
RTOL = 2e-3  # errors are small differences of float32 latents; the two sides add up in another order

both_predictors = pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda predictor: predictor.label)
Calibrate = Callable[[Predictor], Calibration]


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


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    model = TinyDiT()
    path = write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", model)
    with Pipeline.open(path, backend=FakeBackend.of(model)) as opened:
        yield opened


@pytest.fixture
def backend(pipeline: Pipeline) -> FakeBackend:
    """What the pipeline runs on, with nothing launched or allocated yet."""
    backend = pipeline.backend
    assert isinstance(backend, FakeBackend)
    backend.order.clear()
    backend.buffers.clear()
    return backend


@pytest.fixture(scope="module")
def calibrated(pipeline: Pipeline) -> Calibrate:
    @cache
    def calibration(predictor: Predictor) -> Calibration:
        return calibrate(pipeline, options(predictor))

    return calibration


def options(predictor: Predictor = PREDICTORS[0]) -> CalibrationOptions:
    return CalibrationOptions(steps=STEPS, guidance=GUIDANCE, images=IMAGES, predictor=predictor)


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


def test_fewer_than_four_steps_and_samplers_that_add_noise_are_refused(pipeline: Pipeline) -> None:
    assert calibrate(pipeline, CalibrationOptions(steps=4, images=1)).key.steps == 4
    with pytest.raises(CalibrationError, match="steps is 3; with fewer than 4"):
        calibrate(pipeline, CalibrationOptions(steps=3, images=1))
    with pytest.raises(CalibrationError, match=r"sampler ddpm adds noise at every step.*--sampler ddim"):
        calibrate(pipeline, CalibrationOptions(steps=6, images=1, sampler=Sampler.DDPM))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images is 0, allowed"),
        ({"images": 10**12}, "images is 1000000000000, allowed are whole numbers from 1 to 10000"),
        ({"guidance": 0.5}, "guidance is 0.5, allowed"),
        ({"guidance": 1e38}, "guidance is 1e\\+38, allowed"),
        ({"steps": 10**6}, "steps is 1000000, allowed"),
    ],
)
def test_options_out_of_range_are_refused(pipeline: Pipeline, change: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        calibrate(pipeline, CalibrationOptions(**{"steps": 6, **change}))  # type: ignore[arg-type]
    assert calibrate(pipeline, CalibrationOptions(steps=4, images=1)).images == 1  # the pipeline is free again


def needed(pipeline: Pipeline, asked: CalibrationOptions) -> int:
    request = SampleRequest((0,) * asked.images, steps=asked.steps, guidance=asked.guidance)
    size = RunSize.of(request, history=asked.predictor.history, whole_steps=asked.predictor.whole_step)
    return needed_bytes(pipeline.manifest.model, size, asked)


@pytest.mark.parametrize(
    "predictor",
    [Predictor(), Predictor(order=2), Predictor(kind=PredictorKind.OUTPUT_TAYLOR)],
    ids=lambda predictor: predictor.label,
)
def test_what_does_not_fit_into_memory_is_refused_before_the_first_launch(
    pipeline: Pipeline, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, predictor: Predictor
) -> None:
    asked = CalibrationOptions(steps=6, images=3, predictor=predictor)
    bytes_ = needed(pipeline, asked)
    monkeypatch.setattr(memory_need, "available_bytes", lambda: bytes_ - 1)
    what = f"Calibrating 6 steps on 3 images with predictor {predictor.label} needs about 0.0 GiB of memory"
    with pytest.raises(RequestError, match=f"{what}.* are free.*Lower --images"):
        calibrate(pipeline, asked)
    assert (backend.order, backend.buffers) == ([], [])
    monkeypatch.setattr(memory_need, "available_bytes", lambda: bytes_)
    assert calibrate(pipeline, asked).images == 3


@pytest.mark.parametrize(
    "predictor",
    [Predictor(order=2), Predictor(kind=PredictorKind.OUTPUT_TAYLOR)],
    ids=lambda predictor: predictor.label,
)
def test_the_estimate_of_memory_is_what_is_really_kept(
    pipeline: Pipeline, backend: FakeBackend, predictor: Predictor
) -> None:
    asked = CalibrationOptions(steps=24, images=20, predictor=predictor)
    held: list[int] = []  # whenever a launch begins: a fake engine's own temporaries are none of calibration's
    backend.before_launch = lambda part: held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.start()
    try:
        calibrate(pipeline, asked)
    finally:
        tracemalloc.stop()
    assert max(held) / 2 < needed(pipeline, asked) < max(held)


def overflowing(function: Part, *, fails_at: Callable[[int], bool]) -> Part:
    """A part whose outputs are NaN in some steps."""

    def run(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        factor = np.float32(np.nan if fails_at(step_of(tensors)) else 1.0)
        return {name: np.asarray(values, np.float32) * factor for name, values in function(tensors).items()}

    return run


def step_of(tensors: Tensors) -> int:
    return int(tensors["step" if "step" in tensors else "gate_steps"][0])


def pipeline_with(tmp_path: Path, part: str, fails_at: Callable[[int], bool]) -> Pipeline:
    model = TinyDiT()
    functions = dict(FakeBackend.of(model).functions)
    functions[part] = overflowing(functions[part], fails_at=fails_at)
    return Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend(functions))


@both_predictors
@pytest.mark.parametrize("step", [0, 7])
def test_a_model_that_overflows_is_refused(tmp_path: Path, predictor: Predictor, step: int) -> None:
    """Errors against NaN would be NaN, which no comparison ever finds too large."""
    with (
        pipeline_with(tmp_path, "head", lambda at: at >= step) as pipeline,
        pytest.raises(EngineError, match=rf"NaN or infinite values after step {step + 1} of {STEPS}"),
    ):
        calibrate(pipeline, options(predictor))


@pytest.mark.parametrize(
    ("predictor", "part"), [(PREDICTORS[0], "predict_2_u4"), (PREDICTORS[1], "extrapolate_2")], ids=["blocks", "output"]
)
def test_a_prediction_that_overflows_can_not_be_skipped(tmp_path: Path, predictor: Predictor, part: str) -> None:
    """In float16 it may; steps that it does not touch are calibrated as ever."""
    with pipeline_with(tmp_path, part, lambda at: at == 7) as pipeline:
        calibration = calibrate(pipeline, options(predictor))
    costs = np.asarray(calibration.skip_costs)[:, 0]  # at a gap of one, by first step and count
    touched = np.asarray([[first <= 7 < first + count for count in range(1, 7)] for first in range(STEPS)])
    assert np.isinf(costs[touched]).all()
    assert np.isfinite(costs[2:6, 0]).all() and np.isfinite(costs[8:, 0]).all()
    expected = np.asarray(calibration.probe.expected)
    assert (expected[7] == 0).all()  # not measured
    assert (expected[8, 0] > 0).all()
    assert calibration_from_json(calibration.model_dump_json(), where="here") == calibration


def test_signals_that_overflow_leave_a_limit_that_nothing_passes(tmp_path: Path) -> None:
    """Without a bound, infinite limits would let any request reuse, and the file could not be read back."""
    model = TinyDiT()
    functions = dict(FakeBackend.of(model).functions)
    signals = functions["signals"]
    functions["signals"] = lambda tensors: {"signals": np.full_like(signals(tensors)["signals"], np.inf)}
    with Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend(functions)) as pipeline:
        calibration = calibrate(pipeline, options())
    assert calibration.offset_limits == ((0.0,) * 6,) * STEPS
    assert calibration.paper_floors == (0.0,) * len(model.spec.units)
    assert calibration_from_json(calibration.model_dump_json(), where="here") == calibration


@both_predictors
@pytest.mark.parametrize("interrupted_at", [1, 5, STEPS - 1])
def test_an_interrupted_calibration_goes_on_where_it_was_and_is_the_same(
    pipeline: Pipeline,
    backend: FakeBackend,
    calibrated: Calibrate,
    tmp_path: Path,
    predictor: Predictor,
    interrupted_at: int,
) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "skipping from every step" and done == interrupted_at:
            raise KeyboardInterrupt

    identity = {"measurement": "the same"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline, options(predictor), interrupt, Partials(tmp_path / "part", identity))
    backend.order.clear()
    seen: list[tuple[str, int]] = []
    resumed = calibrate(
        pipeline,
        options(predictor),
        lambda phase, done, total: seen.append((phase, done)),
        Partials(tmp_path / "part", identity),
    )
    assert resumed.model_dump_json() == calibrated(predictor).model_dump_json()
    assert seen == [("skipping from every step", step) for step in range(interrupted_at, STEPS + 1)]


def test_a_finished_calibration_that_could_not_be_stored_is_not_measured_again(
    pipeline: Pipeline, backend: FakeBackend, calibrated: Calibrate, tmp_path: Path
) -> None:
    predictor = PREDICTORS[1]
    calibrate(pipeline, options(predictor), None, Partials(tmp_path / "part", {}))
    backend.order.clear()
    again = calibrate(pipeline, options(predictor), None, Partials(tmp_path / "part", {}))
    assert backend.order.count("block_00") <= STEPS  # only the window is evaluated
    assert again == calibrated(predictor)
