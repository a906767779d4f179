"""A tiny model's pipeline, and its calibrations, each measured once for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.caching.predictors import Predictor
from adacorr_deploy.quality.calibrate import calibrate
from adacorr_deploy.runtime import Pipeline
from tests.quality.calibrating import Calibrate, options
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT


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
