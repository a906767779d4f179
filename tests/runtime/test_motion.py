"""What moves from frame to frame is measured on what the loop has just kept, and decides how many steps are skipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.caching.gate_controller import GateController
from adacorr_deploy.caching.gates.codebook import AdaCacheGate, MotionRegularisation
from adacorr_deploy.caching.policy import PRESETS, Policy
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy
from adacorr_deploy.runtime.span_launches import SpanLaunches
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_clips import FRAMES, TinyClips

Array = NDArray[np.float32]
REQUEST = SampleRequest((0, 2), steps=24, guidance=3.0, seed=7)
ALWAYS = (0.0, 1.0)


@pytest.fixture
def clips(tmp_path: Path) -> Iterator[Pipeline]:
    model = TinyClips()
    with Pipeline.open(write_bundle(tmp_path / "clips", model), backend=FakeBackend.of(model)) as pipeline:
        yield pipeline


def adacache(motion: MotionRegularisation | None, *, tolerance: float = 1.0) -> Policy:
    return PRESETS["adacache"].model_copy(update={"gate": AdaCacheGate(motion=motion, tolerance=tolerance)})


def motion_by_hand(frames: Array) -> float:
    """Of (F, numbers), frame after frame."""
    change = sum(float(np.abs(later - earlier).sum()) for earlier, later in itertools.pairwise(frames))
    both = sum(float(np.abs(frame).sum()) for frame in (*frames[:-1], *frames[1:]))
    return change / both


def test_motion_is_that_of_the_spans_fresh_residual(clips: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, seen = SpanLaunches.motion, list[tuple[Array, Array]]()

    def watched(launches: SpanLaunches) -> object:
        space, (span,) = launches._space, launches._spans
        ends = space.block_output(span.stop - 1).read(), space.block_input(span.first).read()
        after, before = (np.asarray(each, np.float32) for each in ends)
        reading = measure(launches)
        seen.append((after - before, np.asarray(reading(), np.float32)))
        return reading

    monkeypatch.setattr(SpanLaunches, "motion", watched)
    sample_with_policy(clips, REQUEST, adacache(MotionRegularisation(window=ALWAYS)))
    assert len(seen) >= 2
    for residual, found in seen:
        expected = [motion_by_hand(row.reshape(FRAMES, -1)) for row in residual]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert 0.05 < min(expected) < max(expected) < 1


def test_more_motion_skips_fewer_steps_and_less_skips_more(clips: Pipeline) -> None:
    plain = sample_with_policy(clips, REQUEST, adacache(None, tolerance=5)).launches
    moving = MotionRegularisation(reference=0.01, exponent=1, window=ALWAYS)
    still = MotionRegularisation(reference=10, exponent=2, gradient=0, window=ALWAYS)
    more = sample_with_policy(clips, REQUEST, adacache(moving, tolerance=5)).launches
    fewer = sample_with_policy(clips, REQUEST, adacache(still, tolerance=5)).launches
    assert fewer < plain < more


def test_motion_of_a_whole_step_is_that_of_the_models_output(clips: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adacache(MotionRegularisation(window=ALWAYS)).model_copy(
        update={"predictor": Predictor(kind=PredictorKind.OUTPUT_TAYLOR)}
    )
    found: list[float | None] = []
    record = GateController.record_change

    def watched(controller: GateController, step: int, span: int, signals: object) -> None:
        found.extend(branch.motion for branch in signals)  # type: ignore[attr-defined]
        record(controller, step, span, signals)  # type: ignore[arg-type]

    monkeypatch.setattr(GateController, "record_change", watched)
    sample_with_policy(clips, REQUEST, policy)
    assert len(found) >= 2
    assert all(motion is not None and 0 < motion < 1 for motion in found)


def test_a_model_of_images_refuses_it_with_a_reason(pipeline: Pipeline) -> None:
    with pytest.raises(PolicyError, match=r"gate.motion is measured between frames, and this run makes images"):
        sample_with_policy(pipeline, REQUEST, adacache(MotionRegularisation()))
