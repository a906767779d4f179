"""Tuning chooses among real runs of real policies, deterministically, and an interrupted search is taken up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from adacorr_deploy.caching.policy import Policy, policy_named
from adacorr_deploy.core.errors import CalibrationError, PolicyError, RequestError
from adacorr_deploy.quality.calibrate import CalibrationOptions
from adacorr_deploy.quality.partials import Partials
from adacorr_deploy.quality.policy_calibration import store_calibration
from adacorr_deploy.quality.tune import Meter, TunedPoint, TuneOptions, families_that_fit, tune
from adacorr_deploy.quality.tune_search import Target
from adacorr_deploy.runtime import Pipeline, SampleRequest
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT

STEPS = 12
FAMILIES = ("fewer-steps", "fora", "scheduled", "robust")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    model = TinyDiT()
    path = write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", model)
    with Pipeline.open(path, backend=FakeBackend.of(model)) as opened:
        store_calibration(opened, CalibrationOptions(steps=STEPS, images=2))
    with Pipeline.open(path, backend=FakeBackend.of(model)) as opened:
        yield opened


def options(target: Target, families: tuple[str, ...] = FAMILIES, images: int = 6) -> TuneOptions:
    return TuneOptions(target=target, families=families, steps=STEPS, images=images)


def blocks_run(pipeline: Pipeline) -> int:
    backend = pipeline.backend
    assert isinstance(backend, FakeBackend)
    return backend.order.count("block_00")


def test_of_a_target_speed_the_front_holds_the_chosen_policy_and_nothing_beats_it(pipeline: Pipeline) -> None:
    found = tune(pipeline, options(Target(speedup=1.5)))
    assert found.chosen in found.front
    assert [point.speedup for point in found.front] == sorted(point.speedup for point in found.front)
    for point in found.points:
        assert point.images == 6
        assert point.speedup == pytest.approx(1 / (1 - point.rho))
        assert any(other.speedup >= point.speedup and other.psnr_db >= point.psnr_db for other in found.front)
    assert all(point.measured_speedup is not None for point in found.front)


def test_a_machine_that_slows_down_touches_a_point_and_its_uncached_run_alike(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs take twice as long after every pair, and a policy's are always half as long as the uncached one's."""
    calls = itertools.count()

    def sampled(pipeline: Pipeline, request: SampleRequest, policy: Policy) -> SimpleNamespace:
        return SimpleNamespace(seconds=2.0 ** (next(calls) // 2) * (1.0 if policy.name == "none" else 0.5))

    monkeypatch.setattr("adacorr_deploy.quality.tune.sample_with_policy", sampled)
    points = [
        TunedPoint(policy=policy_named(name), images=1, rho=0.5, speedup=2.0, psnr_db=30.0, psnr_worst_db=30.0)
        for name in ("fora@2", "fora@3", "scheduled@2")
    ]
    meter = Meter(pipeline, [SampleRequest((0,), steps=STEPS)], Partials(pipeline.bundle.path / "none", {}))
    assert [point.measured_speedup for point in meter.timed(points)] == [2.0, 2.0, 2.0]


def test_a_target_speed_is_met_by_the_clock_not_by_the_share_of_skipped_launches(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which reusing costs a fifth of an evaluation: 2.0 by the clock needs 2.7 of the blocks."""

    def timed(self: Meter, points: Sequence[TunedPoint]) -> list[TunedPoint]:
        return [replace(point, measured_speedup=1 / (1 - 0.8 * point.rho)) for point in points]

    monkeypatch.setattr(Meter, "timed", timed)
    found = tune(pipeline, options(Target(speedup=1.6), families=("robust", "fora"), images=4))
    assert found.meets_target
    assert found.chosen.measured_speedup == pytest.approx(1.6, rel=0.15)  # 12 steps: a twelfth of the work at a time
    rivals = [point for point in found.front if (point.measured_speedup or 0) >= 1.6]
    assert found.chosen.psnr_db == max(point.psnr_db for point in rivals)
    assert any(point.policy == found.chosen.policy for point in found.front)


def test_points_are_the_same_whenever_they_are_measured(pipeline: Pipeline) -> None:
    chosen = options(Target(speedup=2.0), families=("fora", "robust"), images=3)
    one, other = (tune(pipeline, chosen) for _ in range(2))
    assert one.points == other.points


def test_a_target_quality_is_kept_by_every_point_that_could_be_chosen(pipeline: Pipeline) -> None:
    found = tune(pipeline, options(Target(psnr_db=25.0)))
    assert found.meets_target
    assert found.chosen.psnr_db >= 25.0
    slower = tune(pipeline, options(Target(psnr_db=45.0)))
    assert slower.chosen.rho <= found.chosen.rho


def test_a_target_that_none_meets_gives_the_nearest_and_says_so(pipeline: Pipeline) -> None:
    found = tune(pipeline, options(Target(psnr_db=119.0), families=("fora",)))
    assert not found.meets_target or math.isinf(found.chosen.psnr_db)


def test_an_interrupted_search_is_taken_up(pipeline: Pipeline) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("robust"):
            raise KeyboardInterrupt

    chosen = options(Target(psnr_db=30.0), families=("fora", "robust"), images=4)  # no clock changes what is run
    whole = tune(pipeline, chosen)
    before = blocks_run(pipeline)
    tune(pipeline, chosen)
    in_one_go = blocks_run(pipeline) - before
    with pytest.raises(KeyboardInterrupt):
        tune(pipeline, chosen, interrupt)
    before = blocks_run(pipeline)
    assert tune(pipeline, chosen).points == whole.points
    assert blocks_run(pipeline) - before < in_one_go
    assert not list(pipeline.bundle.path.rglob(".unfinished*"))


def test_the_chosen_policy_is_one_that_a_file_can_hold(pipeline: Pipeline) -> None:
    found = tune(pipeline, options(Target(speedup=1.5), images=2))
    text = found.chosen.policy.model_dump_json(by_alias=True, exclude_none=True)
    assert Policy.model_validate_json(text) == found.chosen.policy


def test_what_can_not_be_tuned_is_refused_before_anything_runs(pipeline: Pipeline) -> None:
    before = blocks_run(pipeline)
    with pytest.raises(PolicyError, match="policy none has no knob to tune"):
        tune(pipeline, options(Target(speedup=2.0), families=("fora", "none")))
    with pytest.raises(CalibrationError, match="scheduled-blocks needs a calibration"):
        tune(pipeline, options(Target(speedup=2.0), families=("scheduled-blocks",)))
    with pytest.raises(RequestError, match="target speed-up is 1, allowed is more than 1"):
        options(Target(speedup=1.0))
    with pytest.raises(RequestError, match="there is no policy to tune"):
        options(Target(speedup=2.0), families=())
    assert blocks_run(pipeline) == before


def test_every_preset_with_a_knob_that_the_bundle_has_blocks_for_is_a_family(pipeline: Pipeline) -> None:
    families = families_that_fit(pipeline, SampleRequest((0,), steps=STEPS))
    assert {"fora", "teacache", "robust", "fewer-steps"} <= set(families)
    assert not {"none", "dbcache", "paper-exact"} & set(families)  # three parts are fewer than dbcache evaluates
    assert all(policy_named(name).gate.knob for name in families)


def test_a_measured_point_is_taken_up_and_one_that_nobody_measured_is_not(pipeline: Pipeline) -> None:
    partials = Partials(pipeline.bundle.path / "points", {})
    requests, policy = [SampleRequest((0,), steps=STEPS)], policy_named("fora")
    measured = Meter(pipeline, requests, partials).point(policy, 1)
    (file,) = (pipeline.bundle.path / "points").glob("*.npz")
    for psnr, rho, taken in ((50.0, 0.25, True), (np.nan, 0.25, False), (50.0, 7.0, False), (50.0, np.nan, False)):
        partials.store(file.stem, {"psnr": np.array([psnr]), "rho": np.asarray(rho)})
        found = Meter(pipeline, requests, partials).point(policy, 1)
        assert (found.psnr_db, found.rho) == ((psnr, rho) if taken else (measured.psnr_db, measured.rho))
