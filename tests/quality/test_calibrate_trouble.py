"""A calibration that can't be measured is refused in one line, and one that is interrupted loses nothing."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.calibration import calibration_from_json
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.caching.revision import Revision
from adacorr_deploy.core.errors import CalibrationError, EngineError, RequestError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.quality import memory_need
from adacorr_deploy.quality.calibrate import CalibrationOptions, calibrate, needed_bytes
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import RunSize
from tests.quality.calibrating import PREDICTORS, REVISED, STEPS, Calibrate, both_predictors, options
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import Part, Tensors, TinyDiT


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
    predictor = asked.predictor
    outputs = predictor.revision.evaluations
    size = RunSize.of(request, history=predictor.history, whole_steps=predictor.whole_step, outputs=outputs)
    return needed_bytes(pipeline.manifest.model, size, asked)


@pytest.mark.parametrize(
    "predictor",
    [Predictor(), Predictor(order=2), Predictor(kind=PredictorKind.OUTPUT_TAYLOR), REVISED],
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
    [
        Predictor(order=2),
        Predictor(kind=PredictorKind.OUTPUT_TAYLOR),
        REVISED,
        Predictor(kind=PredictorKind.HOLD, revision=Revision.QUADRATIC),  # reads more outputs than units
    ],
    ids=lambda predictor: predictor.label,
)
def test_the_estimate_of_memory_is_what_is_really_kept(
    pipeline: Pipeline, backend: FakeBackend, predictor: Predictor
) -> None:
    asked = CalibrationOptions(steps=24, images=20, predictor=predictor)
    most = 0

    def held(part: str) -> None:
        """Look whenever a launch begins: a fake engine's own temporaries and notes are none of calibration's."""
        nonlocal most
        backend.order.clear()
        most = max(most, tracemalloc.get_traced_memory()[0])

    backend.before_launch = held
    tracemalloc.start()
    try:
        calibrate(pipeline, asked)
    finally:
        tracemalloc.stop()
    assert most / 2 < needed(pipeline, asked) < most


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
