"""The studies compare what they say: policies at equal ρ, and forecasts by the variance that they explain."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "benchmarks"))  # scripts import their siblings

from policies import TARGETS, Point, Study, corrected_names, interpolated
from validity import AGES, GAP, explained, monotone, recorded

from adacorr_deploy.runtime import Pipeline
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT


def point(rho: float, psnr_db: float) -> Point:
    return Point(policy="any", rho=rho, psnr_db=psnr_db, psnr_p10_db=0.0, images=1)


def test_a_base_is_read_between_its_own_points_and_nowhere_else() -> None:
    points = [point(0.6, 30.0), point(0.2, 50.0), point(0.4, 45.0)]
    assert interpolated(points, 0.5) == pytest.approx(37.5)
    assert interpolated(points, 0.2) == 50.0
    assert interpolated(points, 0.7) is None
    assert interpolated(points[:1], 0.6) is None


def test_adacorrection_is_aimed_at_each_target_and_the_papers_weight_stands_on_each_setting() -> None:
    base = [
        Point(policy=f"fora@{interval}", rho=1 - 1 / interval, psnr_db=0.0, psnr_p10_db=0.0, images=1)
        for interval in (2, 3)
    ]
    assert list(corrected_names("paper-lazy", base)) == ["fora@2+paper-lazy", "fora@3+paper-lazy"]
    assert list(corrected_names("adacorrection", base)) == [
        f"fora@{3 if target > 6**0.5 else 2}+adacorrection@{target:g}" for target in TARGETS
    ]
    assert list(corrected_names("adacorrection", [])) == []


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=40, unique_by=lambda pair: pair[0]))
def test_a_monotone_curve_never_falls_and_no_constant_part_could_be_better(pairs: list[tuple[float, float]]) -> None:
    x, y = np.asarray(pairs).T
    knots, fitted = monotone(x, y)
    assert (np.diff(knots) > 0).all()
    assert (np.diff(fitted) >= -1e-12).all()
    ordered = y[np.argsort(x)]
    for level in np.unique(fitted):  # each level is the mean of what it stands for: the least-squares solution
        assert ordered[fitted == level].mean() == pytest.approx(level, abs=1e-9)


def test_a_perfect_forecast_explains_all_and_the_table_nothing() -> None:
    errors = np.random.default_rng(0).standard_normal((5, 2, 8))
    table = errors.mean(axis=2)
    assert explained(errors, errors, table) == 1.0
    assert explained(errors, np.broadcast_to(table[:, :, None], errors.shape), table) == 0.0


def test_a_study_goes_on_where_it_was_and_refuses_another_ones_folder(tmp_path: Path) -> None:
    run = {"images": 2, "batch": 1, "steps": 8, "guidance": 2.0, "calibrated_guidance": None, "seed": 0, "labels": ""}
    args = argparse.Namespace(output=tmp_path, **run)
    model = TinyDiT()
    with Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend.of(model)) as pipeline:
        first = Study(pipeline, args).point("fora@2")
        assert first is not None
        assert 0.2 < first.rho < 0.6
        backend = pipeline.backend
        assert isinstance(backend, FakeBackend)
        backend.order.clear()
        assert Study(pipeline, args).point("fora@2") == first
        assert backend.order == []
        assert Study(pipeline, args).point("robust@2") is None  # not calibrated: said on standard error
        file = tmp_path / "mine.json"
        for interval, rho in ((2, first.rho), (4, None)):  # a file's points are those of what it holds
            gate = {"kind": "interval", "interval": interval}
            file.write_text(json.dumps({"name": "mine", "gate": gate, "predictor": {"kind": "gated"}}))
            found = Study(pipeline, args).point(str(file))
            assert found is not None
            assert (found.rho == rho) == (interval == 2)
        for changed in ({"guidance": 3.0}, {"calibrated_guidance": 4.0}):
            with pytest.raises(SystemExit, match="holds another study"):
                Study(pipeline, argparse.Namespace(output=tmp_path, **run | changed))


def test_a_study_of_forecasts_records_as_many_images_as_it_was_asked_for(tmp_path: Path) -> None:
    args = argparse.Namespace(images=3, batch=2, steps=6, guidance=2.0)
    model = TinyDiT()
    with Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend.of(model)) as pipeline:
        found = recorded(pipeline, args)
    assert found.errors.shape == found.offsets.shape == (args.steps, len(AGES), args.images)
    known = ~np.isnan(found.errors)
    assert known[AGES[0] + GAP :, 0].all() and not known[: AGES[0] + GAP].any()
