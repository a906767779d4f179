"""Rows say what the runs did: the same images for every policy, launches that were really saved, honest medians."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import PRESETS, IntervalGate, Policy, policy_named
from adacorr_deploy.caching.predictors import Predictor, PredictorKind
from adacorr_deploy.core.errors import CalibrationError, EngineError, PolicyError, RequestError
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.specs import DecoderSpec, DType, ModelSpec
from adacorr_deploy.quality import bench as module
from adacorr_deploy.quality import bench_options, bench_sampling, memory_need
from adacorr_deploy.quality.bench import bench, check_runs, equal_latency_steps, fewer_steps_policy
from adacorr_deploy.quality.bench_options import BenchOptions, requests
from adacorr_deploy.quality.bench_rows import BenchRow, best_by_speed
from adacorr_deploy.quality.features import FeatureSource, image_shape
from adacorr_deploy.runtime import MAX_SEED, Pipeline, SampleRequest, SampleResult, sample_with_policy
from adacorr_deploy.runtime.denoise import LatentsObserver
from tests.runtime.conftest import write_bundle
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.tiny_dit import TinyDiT

STEPS = 12
OPTIONS = BenchOptions(images=5, batch=2, rounds=1, steps=STEPS, guidance=3.0, seed=4)
FORA = policy_named("fora")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny", TinyDiT())


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend.of(TinyDiT())


@pytest.fixture
def pipeline(tiny: Path, backend: FakeBackend) -> Iterator[Pipeline]:
    with Pipeline.open(tiny, backend=backend) as opened:
        yield opened


def rows_by_policy(pipeline: Pipeline, *names: str, options: BenchOptions = OPTIONS) -> dict[str, BenchRow]:
    return {row.policy: row for row in bench(pipeline, [policy_named(name) for name in names], options).rows}


def taking(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]], *, others: float = 1.0) -> None:
    """Let each policy's rounds take these seconds, one after the other; the last is repeated."""
    calls: dict[str, int] = {}

    def timed(opened: Pipeline, policy: Policy, options: BenchOptions) -> float:
        given = seconds.get(policy.name, [others])
        calls[policy.name] = calls.get(policy.name, 0) + 1
        return given[min(calls[policy.name], len(given)) - 1]

    monkeypatch.setattr(module, "_seconds_for_all", timed)
    monkeypatch.setattr(module, "_block_share", lambda opened, options: 0.75)


def test_the_uncached_run_is_compared_with_itself(pipeline: Pipeline) -> None:
    (row,) = bench(pipeline, [], replace(OPTIONS, rounds=3)).rows
    assert (row.policy, row.steps) == ("none", STEPS)
    assert (row.speedup, row.rho, row.efficiency) == (1.0, 0.0, 1.0)
    assert (row.psnr_db, row.psnr_worst_db) == (math.inf, math.inf)
    assert math.isnan(row.ssim)  # 4×4 images are smaller than its window


def test_rho_is_that_of_the_traces_and_of_the_engines_counters(pipeline: Pipeline) -> None:
    row = rows_by_policy(pipeline, "fora")["fora"]
    results = [sample_with_policy(pipeline, request, FORA) for request in requests(pipeline, OPTIONS)]
    assert [len(result.latents) for result in results] == [2, 2, 1]
    assert {result.rho for result in results} == {row.rho}
    full = STEPS * len(pipeline.manifest.model.units)
    assert sum(result.launches for result in results) == round((1 - row.rho) * full * len(results))
    assert 0.4 < row.rho < 2 / 3


def test_fewer_steps_counts_the_launches_of_the_steps_not_taken(pipeline: Pipeline) -> None:
    row = rows_by_policy(pipeline, "fewer-steps@3")["fewer-steps@3"]
    assert row.steps == 4
    assert row.rho == pytest.approx(1 - 4 / STEPS)
    assert 0 < row.psnr_worst_db <= row.psnr_db < 80


def test_quality_is_of_the_latents_of_all_requests(pipeline: Pipeline) -> None:
    row = rows_by_policy(pipeline, "fora")["fora"]
    errors = []
    for request in requests(pipeline, OPTIONS):
        cached = sample_with_policy(pipeline, request, FORA).latents
        exact = sample_with_policy(pipeline, request, PRESETS["none"]).latents
        errors += np.square(cached.astype(np.float64) - exact).mean(axis=(1, 2, 3)).tolist()
    decibels = [10 * math.log10(4 / error) for error in errors]
    assert len(decibels) == OPTIONS.images
    assert row.psnr_db == pytest.approx(np.mean(decibels))
    assert row.psnr_worst_db == pytest.approx(min(decibels))


def test_an_image_that_did_not_change_does_not_hide_those_that_did(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose every block was evaluated has no finite PSNR: the mean must still be that of the others."""

    def first_is_exact(
        opened: Pipeline, request: SampleRequest, policy: Policy, *, on_latents: LatentsObserver | None = None
    ) -> SampleResult:
        chosen = PRESETS["none"] if request.seed == OPTIONS.seed else policy
        return sample_with_policy(opened, request, chosen, on_latents=on_latents)

    cached = rows_by_policy(pipeline, "fora")["fora"]
    monkeypatch.setattr(bench_sampling, "sample_with_policy", first_is_exact)
    row = rows_by_policy(pipeline, "fora")["fora"]
    assert math.isfinite(row.psnr_db)
    assert row.psnr_worst_db <= row.psnr_db
    assert row.psnr_worst_db >= cached.psnr_worst_db


def test_requests_make_every_image_once_with_its_own_seed_and_class(pipeline: Pipeline) -> None:
    """Images are pairs across policies, not across batch sizes: an image is drawn from its request's seed and place."""
    made = list(requests(pipeline, replace(OPTIONS, images=7, batch=3)))
    assert [request.labels for request in made] == [(0, 1, 2), (0, 1, 2), (0,)]
    assert [request.seed for request in made] == [4, 7, 10]
    assert len({(request.seed, place) for request in made for place in range(request.batch)}) == 7
    assert {(request.steps, request.guidance, request.sampler) for request in made} == {(STEPS, 3.0, Sampler.DDIM)}


def test_every_round_runs_each_policy_in_turn_and_progress_ends_whole(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking(monkeypatch, {"none": [2.0], "fora": [1.0]})
    told: list[tuple[str, int, int]] = []
    options = replace(OPTIONS, rounds=2)
    bench(pipeline, [FORA, policy_named("fewer-steps")], options, lambda *said: told.append(said))
    rounds = [text for text, *_ in told if "round" in text and "found" not in text]
    assert rounds == [f"{name}, round {k} of 2" for k in (1, 2) for name in ("none", "fora", "fewer-steps")]
    assert all(before[1] <= after[1] and before[2] <= after[2] for before, after in itertools.pairwise(told))
    assert told[-1] == ("", 3 * 3 * (1 + 2), 3 * 3 * (1 + 2))  # three policies, three requests, images and two rounds


def test_speedup_is_the_median_of_paired_rounds(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine slows down tenfold in one round: a ratio of medians of unpaired rounds would show it."""
    taking(monkeypatch, {"none": [4.0, 40.0, 2.0], "fora": [2.0, 10.0, 2.0]})
    row = rows_by_policy(pipeline, "fora", options=replace(OPTIONS, rounds=3))["fora"]
    assert (row.seconds, row.speedup) == (2.0, 2.0)  # ratios 2, 4, 1
    assert row.efficiency == pytest.approx(2.0 * (1 - row.rho * 0.75))


def test_every_policy_is_paired_with_as_many_steps_as_take_its_time(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the user gave serves; policies of the same time share theirs; what saves nothing is paired with none."""
    taking(
        monkeypatch, {"none": [6.0], "fora": [3.0], "fora@2": [4.1], "fora@4": [4.4], "paper-exact": [7.0]}, others=3.1
    )
    names = ("fora", "fora@2", "fora@4", "paper-exact", "fewer-steps@2")
    rows = rows_by_policy(pipeline, *names)
    assert rows["fora"].baseline == "fewer-steps@2"
    assert rows["fora@2"].baseline == rows["fora@4"].baseline == "fewer-steps@1.3"
    assert rows["fewer-steps@1.3"].steps == 9  # 12 · 4.1 ÷ 6 = 8.2: at least as long, and not a step more
    assert rows["fewer-steps@1.3"].pairs_with == "fora@2, fora@4"
    assert rows["fewer-steps@2"].pairs_with == "fora"
    assert rows["paper-exact"].baseline == "none"
    assert rows["fora"].gain_db == pytest.approx(rows["fora"].psnr_db - rows["fewer-steps@2"].psnr_db)
    assert math.isnan(rows["fewer-steps@2"].gain_db)


@given(st.integers(1, 1000), st.floats(0.5, 40))
def test_a_baseline_takes_at_least_as_long_and_not_a_step_more(steps: int, speedup: float) -> None:
    taken = equal_latency_steps(steps, speedup)
    assert 1 <= taken <= steps
    assert taken >= min(steps, steps / speedup - 1e-6)
    assert taken - 1 < max(steps / speedup, -(-steps // 20))
    assert fewer_steps_policy(steps, taken).sampled_steps(steps) == taken


def test_a_policy_whose_engine_fails_is_a_row_that_says_so_and_the_others_are_measured(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(
        opened: Pipeline, request: SampleRequest, policy: Policy, *, on_latents: LatentsObserver | None = None
    ) -> SampleResult:
        if policy.name == "fora":
            raise EngineError("block_01 failed")
        return sample_with_policy(opened, request, policy, on_latents=on_latents)

    monkeypatch.setattr(bench_sampling, "sample_with_policy", failing)
    measured = bench(pipeline, [FORA, policy_named("fora@2")], OPTIONS)
    rows = {row.policy: row for row in measured.rows}
    assert measured.failed == ["fora"]
    assert rows["fora"].error == "block_01 failed"
    assert math.isnan(rows["fora"].psnr_db)
    assert math.isfinite(rows["fora@2"].psnr_db)


def test_the_error_grows_from_nothing_to_that_of_the_images(pipeline: Pipeline) -> None:
    """Step by step as an observer sees it: no error while everything is evaluated, and at the end the images' own."""
    measured = bench(pipeline, [FORA, policy_named("fewer-steps")], OPTIONS)
    fora, none = measured.runs["fora"].sampled, measured.runs["none"].sampled
    assert fora is not None and none is not None and fora.growth is not None
    evaluated = (fora.trajectory.decisions.actions == "evaluate").all(axis=1)
    first_skip = int(np.flatnonzero(~evaluated)[0])
    assert first_skip > 0
    np.testing.assert_array_equal(fora.growth[:first_skip], 0.0)
    assert (fora.growth[first_skip:] > 0).all()
    expected, mine = none.latents[:2].reshape(2, -1), fora.latents[:2].reshape(2, -1)
    relative = np.linalg.norm(mine - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert fora.growth[-1] == pytest.approx(np.sqrt(np.square(relative).mean()), rel=1e-5)
    np.testing.assert_array_equal(none.growth, 0.0)
    fewer = measured.runs["fewer-steps"].sampled
    assert fewer is not None and fewer.growth is None  # its latents stand at other noise levels


def test_with_a_decoder_features_and_pictures_are_of_images_and_psnr_is_of_latents(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(opened: Pipeline, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(latents, 3, axis=1).repeat(50, axis=2).repeat(50, axis=3)

    class Means:
        def features(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
            assert images.shape[1:] == (3, 200, 200)
            return images.mean(axis=(2, 3)) + np.float32(2)

    plain = rows_by_policy(pipeline, "fora")["fora"]
    decoder = DecoderSpec(precision=DType.FLOAT32, tile=(4, 4), overlap=0, scale=50, channels=3, vae_sha256="0" * 64)
    manifest = pipeline.manifest.model_copy(update={"decoder": decoder})
    monkeypatch.setattr(Pipeline, "manifest", property(lambda opened: manifest))
    monkeypatch.setattr(Pipeline, "decode", decoded)
    assert image_shape(manifest) == (3, 200, 200)
    source = FeatureSource(network=Means(), name="means", identity="means", real=None)
    measured = bench(pipeline, [FORA], OPTIONS, source=source, shown=True)
    sampled = measured.runs["fora"].sampled
    assert sampled is not None and sampled.features is not None and sampled.pictures is not None
    np.testing.assert_allclose(sampled.features[:, 1], sampled.latents.mean(axis=(1, 2, 3)) + 2, rtol=1e-4)
    assert sampled.pictures.shape == (OPTIONS.images, 3, 100, 100)  # every second pixel: at most 128
    rows = {row.policy: row for row in measured.rows}
    assert rows["fora"].psnr_db == plain.psnr_db
    assert rows["fora"].feature_distance > rows["none"].feature_distance == 0.0


def test_the_front_holds_what_nothing_else_beats_in_both() -> None:
    def row(name: str, speedup: float, psnr: float) -> BenchRow:
        return BenchRow(policy=name, steps=1, speedup=speedup, psnr_db=psnr)

    rows = [row("slow", 1, math.inf), row("a", 2, 40), row("b", 2, 41), row("c", 1.5, 39), row("d", 3, 30)]
    assert [found.policy for found in best_by_speed([*rows, row("failed", math.nan, math.nan)])] == ["slow", "b", "d"]


def test_a_policy_given_twice_is_measured_once(pipeline: Pipeline) -> None:
    rows = bench(pipeline, [FORA, PRESETS["none"], FORA], OPTIONS).rows
    assert [row.policy for row in rows if not row.policy.startswith("fewer-steps")] == ["none", "fora"]


@pytest.mark.parametrize("name", ["none", "fora"])
def test_two_policies_of_one_name_are_refused_before_anything_runs(
    pipeline: Pipeline, backend: FakeBackend, name: str
) -> None:
    other = Policy(name=name, gate=IntervalGate(interval=7), predictor=Predictor(kind=PredictorKind.HOLD))
    with pytest.raises(RequestError, match=f"two different policies are named {name}"):
        bench(pipeline, [FORA, other], OPTIONS)
    assert backend.order == []


def test_no_policy_takes_the_name_of_a_baseline(pipeline: Pipeline, backend: FakeBackend) -> None:
    impostor = FORA.model_copy(update={"name": "fewer-steps@2"})
    with pytest.raises(RequestError, match=r"gate interval is named fewer-steps@2, as a baseline is"):
        bench(pipeline, [impostor], OPTIONS)
    assert backend.order == []


def test_samples_without_a_network_for_their_features_are_refused(pipeline: Pipeline, backend: FakeBackend) -> None:
    with pytest.raises(RequestError, match=r"samples is 100, and there is no network.*--features"):
        bench(pipeline, [FORA], replace(OPTIONS, samples=100))
    with pytest.raises(RequestError, match=r"samples is 3, allowed are 0 .* and from 16 up"):
        replace(OPTIONS, samples=3)
    assert backend.order == []


@pytest.mark.parametrize("name", ["images", "batch", "rounds"])
def test_options_below_one_are_refused(pipeline: Pipeline, name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is 0, allowed are whole numbers from 1"):
        bench(pipeline, [FORA], replace(OPTIONS, **{name: 0}))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=f"{name} is 1000000000000, allowed"):
        bench(pipeline, [FORA], replace(OPTIONS, **{name: 10**12}))  # type: ignore[arg-type]


def test_what_a_policy_would_refuse_in_its_turn_is_told_before_anything_runs(
    pipeline: Pipeline, backend: FakeBackend
) -> None:
    with pytest.raises(CalibrationError, match="policy robust needs a calibration"):
        bench(pipeline, [FORA, PRESETS["robust"]], OPTIONS)
    with pytest.raises(RequestError, match=f"seed is {MAX_SEED + 3}"):  # the third request's
        bench(pipeline, [FORA], replace(OPTIONS, seed=MAX_SEED - 1))
    assert backend.order == []


def test_of_a_million_images_the_first_and_the_last_request_are_made_to_be_checked(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them at once would hold the prompts of a million images."""
    made: list[SampleRequest] = []

    def noted(model: ModelSpec, request: SampleRequest, *given: object) -> SampleRequest:
        made.append(request)
        return request

    monkeypatch.setattr(bench_options, "example_request", noted)
    check_runs(pipeline, [FORA], replace(OPTIONS, images=999_999))
    assert [(request.seed, request.batch) for request in made] == [(OPTIONS.seed, 2), (OPTIONS.seed + 999_998, 1)]


def test_noise_that_a_revision_would_draw_again_is_refused_before_anything_runs(
    pipeline: Pipeline, backend: FakeBackend
) -> None:
    with pytest.raises(PolicyError, match="sampler ddpm adds noise"):
        bench(pipeline, [FORA, policy_named("fora+revised")], replace(OPTIONS, sampler=Sampler.DDPM))
    assert backend.order == []


@pytest.mark.parametrize(("images", "lower"), [(8, "--batch"), (100_000, "--images")])
def test_what_does_not_fit_into_memory_is_refused_before_anything_runs(
    pipeline: Pipeline, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, images: int, lower: str
) -> None:
    monkeypatch.setattr(memory_need, "available_bytes", lambda: 0)
    options = replace(OPTIONS, images=images, batch=8)
    what = f"Sampling {images} images of {STEPS} steps in batches of 8 needs about"
    with pytest.raises(RequestError, match=f"{what}.*Lower {lower}, or"):
        bench(pipeline, [FORA], options)
    assert (backend.order, backend.buffers) == ([], [])


def test_no_more_memory_is_asked_for_than_the_largest_run_sizes_take(
    pipeline: Pipeline, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline keeps two sizes. A bench whose every policy has its own needs no more at a time."""
    asked: list[int] = []
    monkeypatch.setattr(module, "require_memory", lambda needed, **words: asked.append(needed))
    fewer = [policy_named(f"fewer-steps@{speedup}") for speedup in (1.5, 2, 3, 4)]
    bench(pipeline, [fewer[0]], OPTIONS)
    bench(pipeline, fewer, OPTIONS)
    image = 4 * 4 * 4 * OPTIONS.images
    assert asked[1] - asked[0] == 3 * image


def test_other_bad_options_and_missing_calibrations_are_the_runtimes_own_errors(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match="guidance is 0"):
        bench(pipeline, [FORA], replace(OPTIONS, guidance=0.0))
    with pytest.raises(CalibrationError, match="policy robust needs a calibration"):
        bench(pipeline, [PRESETS["robust"]], OPTIONS)


def test_structural_similarity_is_one_for_the_same_image_and_less_for_others(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enlarged(
        opened: Pipeline, request: SampleRequest, policy: Policy, *, on_latents: LatentsObserver | None = None
    ) -> SampleResult:
        result = sample_with_policy(opened, request, policy, on_latents=on_latents)
        return replace(result, latents=np.kron(result.latents, np.ones((4, 4), np.float32)))

    monkeypatch.setattr(bench_sampling, "sample_with_policy", enlarged)
    rows = rows_by_policy(pipeline, "fora")
    assert rows["none"].ssim == pytest.approx(1.0, abs=1e-12)
    assert -1 <= rows["fora"].ssim < 1 - 1e-9
    assert rows["fora"].seconds > 0 and rows["fora"].efficiency > 0
