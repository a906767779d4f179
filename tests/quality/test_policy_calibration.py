"""`--policies` measures exactly what its policies look up, so that each of them runs afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from adacorr_deploy.caching.calibration import CachingSpan
from adacorr_deploy.caching.policy import policy_named
from adacorr_deploy.caching.predictors import PredictorKind
from adacorr_deploy.caching.profile import Quantity, profile_name
from adacorr_deploy.core.bundle import PROFILE_DIR, store_in_bundle
from adacorr_deploy.core.errors import CalibrationError, PolicyError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.quality.calibrate import CalibrationOptions, partials_for
from adacorr_deploy.quality.policy_calibration import Needs, calibrate_policies, needs_of, store_calibration
from adacorr_deploy.quality.skip_measurements import SkipMeasurements
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.measurements import calibrations, profiles
from adacorr_deploy.runtime.sampling import controller_for_request
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT

STEPS = 8
OPTIONS = CalibrationOptions(steps=STEPS, images=2)
REQUEST = SampleRequest((0,), steps=STEPS)


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    model = TinyDiT()
    with Pipeline.open(write_bundle(tmp_path / "tiny", model), backend=FakeBackend.of(model)) as opened:
        yield opened


def needs(pipeline: Pipeline, *names: str) -> Needs:
    return needs_of(pipeline, REQUEST, [policy_named(name) for name in names])


def reopened(pipeline: Pipeline) -> Pipeline:
    return Pipeline.open(pipeline.bundle.path, backend=FakeBackend.of(TinyDiT()))


@pytest.mark.parametrize(
    ("name", "quantities"),
    [
        ("teacache", {Quantity.OUTPUT_CHANGE}),
        ("magcache", {Quantity.MAGNITUDE_RATIOS}),
        ("smoothcache", {Quantity.UNIT_ERRORS}),
        ("block-caching", {Quantity.PART_ERRORS, Quantity.AFFINE}),
        ("lazydit", {Quantity.GATES}),
        ("fora", set()),
    ],
)
def test_a_policys_quantities_are_needed_and_no_others(
    pipeline: Pipeline, name: str, quantities: set[Quantity]
) -> None:
    assert needs(pipeline, name) == Needs(calibrations=(), quantities=frozenset(quantities), spans=())


def test_on_top_of_a_base_its_own_spans_are_calibrated_and_each_only_once(pipeline: Pipeline) -> None:
    found = needs(pipeline, "teacache+adacorrection", "adacache+adacorrection@3", "fbcache+adacorrection", "robust")
    spans = [[(span.first, span.stop) for span in caching] for _, caching in found.calibrations]
    assert spans == [[(0, 3)], [(1, 3)], []]
    kinds = [predictor.kind for predictor, _ in found.calibrations]
    assert kinds == [PredictorKind.RESIDUAL, PredictorKind.RESIDUAL, PredictorKind.OUTPUT_TAYLOR]


def test_afterwards_every_policy_finds_what_it_looks_up(pipeline: Pipeline) -> None:
    chosen = [policy_named(name) for name in ("teacache", "fbcache+adacorrection", "block-caching+adacorrection")]
    files = [path for path, _ in calibrate_policies(pipeline, chosen, OPTIONS)]
    assert [path.parent.name for path in files] == ["profile", "calibration", "calibration"]
    with reopened(pipeline) as opened:
        assert opened.bundle.manifest.files.keys() >= {str(path.relative_to(opened.bundle.path)) for path in files}
        for policy in chosen:
            controller_for_request(opened, REQUEST, policy)
        made = calibrations(opened.bundle).values()
        assert {each.spans for each in made} == {
            (CachingSpan(first=1, stop=3),),
            tuple(CachingSpan(first=part, stop=part + 1) for part in range(3)),
        }
        other = SampleRequest((0,), steps=STEPS, guidance=2.0)
        with pytest.raises(CalibrationError, match=r"is for another run \(guidance is 4.0, the run's is 2.0\)"):
            controller_for_request(opened, other, chosen[0])
        with pytest.raises(CalibrationError, match=r"are for .*residual-linear-1-3.*, not residual-linear-0-3"):
            controller_for_request(opened, REQUEST, policy_named("teacache+adacorrection"))
    assert not list(pipeline.bundle.path.rglob(".unfinished*"))


def test_what_the_profile_held_before_is_kept(pipeline: Pipeline) -> None:
    calibrate_policies(pipeline, [policy_named("teacache")], OPTIONS)
    with reopened(pipeline) as opened:
        calibrate_policies(opened, [policy_named("lazydit")], OPTIONS)
    with reopened(pipeline) as opened:
        (found,) = profiles(opened.bundle).values()
    assert found.quantities == {Quantity.OUTPUT_CHANGE, Quantity.GATES}


def test_a_profile_that_can_not_be_read_is_measured_anew_as_its_error_says(pipeline: Pipeline) -> None:
    ((path, key),) = calibrate_policies(pipeline, [policy_named("teacache")], OPTIONS)
    content = path.read_bytes()
    store_in_bundle(pipeline.bundle, f"{PROFILE_DIR}/{profile_name(key)}.json", content.replace(b":1,", b":0,", 1))
    with reopened(pipeline) as opened:
        with pytest.raises(
            CalibrationError, match=r"schema_version.* Make it again with: .* --sampler ddim --steps 8 --guidance 4 "
        ):
            profiles(opened.bundle)
        calibrate_policies(opened, [policy_named("teacache")], OPTIONS)
    assert path.read_bytes() == content


def test_samplers_that_add_noise_have_profiles_but_no_costs(pipeline: Pipeline) -> None:
    noisy = CalibrationOptions(steps=STEPS, images=1, sampler=Sampler.DDPM)
    calibrate_policies(pipeline, [policy_named("teacache")], noisy)
    with pytest.raises(CalibrationError, match="sampler ddpm adds noise"):
        calibrate_policies(pipeline, [policy_named("teacache"), policy_named("fbcache+adacorrection")], noisy)


def test_policies_that_look_nothing_up_or_do_not_fit_the_bundle_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(CalibrationError, match="fora, fbcache: nothing to measure"):
        calibrate_policies(pipeline, [policy_named("fora"), policy_named("fbcache")], OPTIONS)
    with pytest.raises(PolicyError, match="always evaluates the first 8"):
        calibrate_policies(pipeline, [policy_named("dbcache+adacorrection")], OPTIONS)


@pytest.mark.filterwarnings("ignore:invalid value encountered in log")
@pytest.mark.parametrize("name", ["probe_errors", "gains", "paper_scores"])
def test_partial_results_that_nobody_measured_are_refused_and_deleted(pipeline: Pipeline, name: str) -> None:
    """Whoever may write beside the bundle may have written them, in the shapes and with the identity looked for."""
    partials = partials_for(pipeline, OPTIONS)
    blocks = len(pipeline.manifest.model.units)
    arrays = SkipMeasurements.empty(steps=STEPS, blocks=blocks, batch=OPTIONS.images).arrays()
    partials.store("measured", {**arrays, name: np.full_like(arrays[name], -1.0), "done": np.asarray(STEPS)})
    with pytest.raises(CalibrationError, match=r"What was measured can't be used: .* start again"):
        store_calibration(pipeline, OPTIONS)
    assert not list(pipeline.bundle.path.rglob(".unfinished*"))
    path, _ = store_calibration(pipeline, OPTIONS)
    assert path.is_file()
