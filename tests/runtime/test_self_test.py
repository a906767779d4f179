"""The self-test passes exactly where the engines compute what the golden sample says, and reads nothing unchecked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.core.bundle import open_bundle, replace_file, store_in_bundle
from adacorr_deploy.core.engine_build import EngineBuild, Profile, WeightLayout
from adacorr_deploy.core.errors import BundleError, EngineError
from adacorr_deploy.core.golden import GoldenSample
from adacorr_deploy.core.manifest import MANIFEST_NAME, Manifest
from adacorr_deploy.runtime import Pipeline
from adacorr_deploy.runtime.self_test import SelfTestResult, self_test
from tests.runtime.fake_backend import FakeBackend
from tests.runtime.golden import STEPS, golden_sample, store_golden
from tests.runtime.tiny_dit import Tensors, TinyDiT


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "own"))


@pytest.fixture
def sample(bundle: Path, model: TinyDiT) -> GoldenSample:
    return golden_sample(bundle, FakeBackend.of(model))


def outcome(bundle: Path, backend: FakeBackend) -> SelfTestResult:
    with Pipeline.open(bundle, backend=backend) as pipeline:
        return self_test(pipeline)


def spoil(backend: FakeBackend, part: str, factor: Callable[[], float]) -> None:
    """Let a part return its results times a factor that is asked for at each launch."""
    right = backend.functions[part]

    def wrong(tensors: Tensors) -> dict[str, NDArray[np.generic]]:
        return {name: np.asarray(values, np.float32) * np.float32(factor()) for name, values in right(tensors).items()}

    backend.functions = {**backend.functions, part: wrong}


def edit_manifest(bundle: Path, **changes: object) -> None:
    manifest = open_bundle(bundle).manifest.model_copy(update=changes)
    replace_file(bundle / MANIFEST_NAME, manifest.model_dump_json().encode())


def test_engines_that_compute_the_golden_latents_pass(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    store_golden(own_bundle, sample)
    result = outcome(own_bundle, backend)
    assert (result.error, result.tolerance, result.backend, result.hardware) == (0.0, 1e-4, "fake", "CPU")
    assert result.seconds > 0
    assert backend.order.count("block_01") == 2 * STEPS  # block by block, and over whole steps: nothing is reused
    assert not any(name.startswith(("predict", "extrapolate", "blend")) for name in backend.order)


def test_a_wrong_part_fails_with_error_tolerance_place_and_what_to_do(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    store_golden(own_bundle, sample)
    spoil(backend, "block_01", lambda: 1.01)
    with pytest.raises(EngineError) as caught:
        outcome(own_bundle, backend)
    message = str(caught.value)
    found = re.search(
        r"own fails its self-test with fake on CPU: .* by (\S+) \(relative L2\), allowed is 0.0001", message
    )
    assert found is not None, message
    assert 1e-4 < float(found[1]) < 1
    assert "Rebuild the bundle for this machine with adacorr-build" in message
    assert "adacorr-validate" in message


def test_a_part_that_is_right_at_first_and_wrong_when_run_again_fails(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    """As a graph is that replays what it should not."""
    store_golden(own_bundle, sample)
    spoil(backend, "head", lambda: 1.5 if backend.order.count("head") >= STEPS else 1.0)
    with pytest.raises(EngineError, match="fails its self-test"):
        outcome(own_bundle, backend)


def test_the_tolerance_is_the_bundles(own_bundle: Path, backend: FakeBackend, sample: GoldenSample) -> None:
    moved = sample.model_copy(update={"final": np.asarray(sample.final * np.float32(1.001))})
    store_golden(own_bundle, moved.model_copy(update={"tolerance": 2e-3}))
    assert outcome(own_bundle, backend).error == pytest.approx(0.001 / 1.001, rel=1e-3)
    store_golden(own_bundle, moved.model_copy(update={"tolerance": 5e-4}))
    with pytest.raises(EngineError, match=r"by 1\.0e-03 .*allowed is 0\.0005"):
        outcome(own_bundle, backend)


def test_as_many_images_are_sampled_as_the_engines_take_at_least(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    store_golden(own_bundle, sample)
    profile = Profile(batch=(3, 4, 5), steps=(1, 4, 8))
    edit_manifest(
        own_bundle, engine_build=EngineBuild(version="1.0", targets=(), weights=WeightLayout.BAKED, profile=profile)
    )
    assert outcome(own_bundle, backend).error < 1e-6
    assert {buffer.shape[0] for buffer in backend.buffers if buffer.shape[1:] == (1, 4, 4)} == {3}


def test_progress_is_told_before_each_run(own_bundle: Path, backend: FakeBackend, sample: GoldenSample) -> None:
    store_golden(own_bundle, sample)
    told: list[tuple[str, int, int]] = []
    with Pipeline.open(own_bundle, backend=backend) as pipeline:
        self_test(pipeline, lambda what, done, total: told.append((what, done, total)))
    assert told == [("self-test", 0, 2), ("self-test", 1, 2)]


# --- What is no golden sample of this bundle ----------------------------------------------------------------------


def test_a_bundle_without_one_says_so_when_it_is_asked_for(bundle: Path, backend: FakeBackend) -> None:
    with pytest.raises(BundleError, match=r"holds 0 golden samples, .* earlier releases made none. Rebuild .*validate"):
        outcome(bundle, backend)
    assert backend.order == []


def test_of_two_none_is_chosen(own_bundle: Path, backend: FakeBackend, sample: GoldenSample) -> None:
    store_golden(own_bundle, sample)
    store_in_bundle(open_bundle(own_bundle), "golden/other.json", sample.model_dump_json().encode())
    with pytest.raises(BundleError, match="holds 2 golden samples"):
        outcome(own_bundle, backend)


def test_a_second_one_takes_the_place_of_the_first(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    first = store_golden(own_bundle, sample.model_copy(update={"tolerance": 0.5}))
    store_golden(own_bundle, sample)
    assert outcome(own_bundle, backend).tolerance == sample.tolerance
    assert not first.exists()


def changed(**changes: object) -> Callable[[GoldenSample], str]:
    return lambda sample: json.dumps({**json.loads(sample.model_dump_json()), **changes})


def of_one_number(sample: GoldenSample) -> str:
    return sample.model_copy(update={"final": np.ones(1, np.float32)}).model_dump_json()


def too_long(sample: GoldenSample) -> str:
    return sample.model_dump_json() + " " * 10_000


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (lambda sample: "cos\nsystem\n(S'ls'\ntR.", "Invalid JSON"),
        (changed(label=3), "label is 3, allowed are whole numbers from 0 to 2"),
        (changed(steps=101), "steps is 101, allowed are whole numbers from 1 to 100"),
        (changed(initial="AAAA"), "initial: .*multiple of element size"),
        (changed(initial=""), r"cannot reshape array of size 0 into shape \(1,4,4\)"),
        (of_one_number, r"cannot reshape array of size 1 into shape \(1,4,4\)"),
        (too_long, "it is larger than 4288 bytes"),
    ],
)
def test_a_hostile_one_is_one_line_and_nothing_is_run(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample, content: Callable[[GoldenSample], str], fault: str
) -> None:
    stored = store_golden(own_bundle, content(sample))
    with pytest.raises(BundleError, match=fault) as caught:
        outcome(own_bundle, backend)
    message = str(caught.value)
    assert message.startswith(str(stored))
    assert message.endswith("Rebuild the bundle with adacorr-build.")
    assert "\n" not in message
    assert len(message) - len(str(stored)) < 400
    assert backend.order == []


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 4, 6), (65536, 65536, 65536)])
def test_a_hostile_latent_shape_is_refused_too(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample, shape: tuple[int, int, int]
) -> None:
    store_golden(own_bundle, sample)
    raw = json.loads((own_bundle / MANIFEST_NAME).read_text())
    raw["model"]["latents"]["shape"] = shape
    Manifest.model_validate(raw)  # a manifest may say so
    (own_bundle / MANIFEST_NAME).write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=r"sample-\w{12}\.json: "):
        outcome(own_bundle, backend)


def test_golden_latents_of_zeros_are_missed_by_whatever_is_sampled(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    store_golden(own_bundle, sample.model_copy(update={"final": np.zeros((1, 4, 4), np.float32)}))
    with pytest.raises(EngineError, match="by inf"):
        outcome(own_bundle, backend)


def test_one_that_was_replaced_since_the_bundle_was_opened_is_not_read(
    own_bundle: Path, backend: FakeBackend, sample: GoldenSample
) -> None:
    stored = store_golden(own_bundle, sample)
    with Pipeline.open(own_bundle, backend=backend) as pipeline:
        stored.write_text(changed(tolerance=1.0)(sample))
        with pytest.raises(BundleError, match="was replaced after its bundle was opened"):
            self_test(pipeline)
        stored.unlink()
        with pytest.raises(BundleError, match="can't be read any more"):
            self_test(pipeline)
