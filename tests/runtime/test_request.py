"""Every bad request is refused with what it said and what is allowed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.samplers import Sampler, SamplerTable
from adacorr_deploy.runtime.request import MAX_SEED, NoiseStream, SampleRequest, check_request, draws_of_steps
from tests.runtime.tiny_dit import SCHEDULE, tiny_spec

LATENTS = np.zeros((1, 1, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SampleRequest(()), "labels is empty"),
        (
            SampleRequest(cast(tuple[int], 207)),
            "labels is 207, allowed is a tuple of whole numbers from 0 to 2, one",
        ),
        (SampleRequest(cast(tuple[int], "0")), "labels is '0', allowed is a tuple of whole numbers"),
        (SampleRequest(cast(tuple[int], (1.0,))), r"label is 1\.0, allowed are whole numbers from 0 to 2"),
        (SampleRequest((0, 3)), "label is 3, allowed are whole numbers from 0 to 2"),
        (SampleRequest((-1,)), "label is -1"),
        (SampleRequest((True,)), "label is True"),
        (SampleRequest((0,), steps=0), "steps is 0, allowed are whole numbers from 1 to 100"),
        (SampleRequest((0,), steps=101), "steps is 101"),
        (SampleRequest((0,), steps=cast(int, 2.0)), r"steps is 2\.0"),
        (SampleRequest((0,), guidance=math.nan), "guidance is nan"),
        (SampleRequest((0,), guidance=math.inf), "guidance is inf"),
        (SampleRequest((0,), guidance=0.5), r"guidance is 0\.5, allowed is at least 1"),
        (SampleRequest((0,), guidance=cast(float, "4")), "guidance is '4'"),
        (SampleRequest((0,), guidance=100.1), r"guidance is 100\.1, .* at most 100\."),
        (SampleRequest((0,), guidance=1e38), r"guidance is 1e\+38, .* at most 100\."),
        (SampleRequest((0,), guidance=10**400), "guidance is 1000.* at most 100"),
        (SampleRequest((0,), guidance=10**5000), "guidance is .* at most 100"),
        (SampleRequest((0,), steps=10**5000), "steps is .* from 1 to 100"),
        (SampleRequest((0,) * 10_001), "number of labels is 10001, allowed are whole numbers from 1 to 10000"),
        (SampleRequest((0,), seed=-1), "seed is -1"),
        (SampleRequest((0,), seed=MAX_SEED + 1), "seed is 18446744073709551616"),
        (SampleRequest((0,), sampler=cast(Sampler, "euler")), "sampler is 'euler'"),
        (SampleRequest((0, 1), latents=LATENTS), r"shape \(1, 1, 4, 4\).*need \(2, 1, 4, 4\)"),
        (SampleRequest((0,), latents=LATENTS.astype(np.float64)), "latents is float64"),
        (SampleRequest((0,), latents=LATENTS + np.float32(np.nan)), "16 values that are NaN"),
        (SampleRequest((0,), latents=cast(np.ndarray, [[0.0]])), "latents is a list"),
    ],
)
def test_a_request_out_of_range_is_refused(request_: SampleRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(request_, tiny_spec(), SCHEDULE)


def test_the_ends_of_every_range_are_allowed() -> None:
    check_request(SampleRequest((0, 2), steps=1, guidance=1.0, seed=0), tiny_spec(), SCHEDULE)
    check_request(SampleRequest((2,), steps=100, guidance=100.0, seed=MAX_SEED, latents=LATENTS), tiny_spec(), SCHEDULE)


def test_a_learned_variance_needs_a_model_that_predicts_one() -> None:
    learned = replace(SCHEDULE, variance_type="learned_range")
    request = SampleRequest((0,), sampler=Sampler.DDPM)
    check_request(request, tiny_spec(learned_variance=True), learned)
    with pytest.raises(RequestError, match="does not predict"):
        check_request(request, tiny_spec(), learned)


def test_branch_weights_sum_to_one_and_one_branch_has_no_null_rows() -> None:
    guided = SampleRequest((0, 1), guidance=4.0)
    np.testing.assert_array_equal(guided.branch_weights(), [[4, 4], [-3, -3]])
    np.testing.assert_array_equal(guided.rows(3), [0, 1, 3, 3])
    plain = SampleRequest((0, 1), guidance=1.0)
    np.testing.assert_array_equal(plain.branch_weights(), [[1, 1]])
    np.testing.assert_array_equal(plain.rows(3), [0, 1])


def test_images_of_one_seed_differ_and_a_seed_repeats() -> None:
    first, second = (NoiseStream(SampleRequest((0, 0), seed=MAX_SEED), (1, 4, 4)) for _ in range(2))
    draws = [first.at(0), first.at(1)]
    assert first.keys.view(np.uint64).tolist() == [[MAX_SEED, 0], [MAX_SEED, 1]]
    assert len({draw[image].tobytes() for draw in draws for image in range(2)}) == 4
    np.testing.assert_array_equal(draws, [second.at(0), second.at(1)])


def test_the_draws_of_steps_follow_the_initial_latents_and_skip_steps_without() -> None:
    coefficients = np.zeros((4, 8), np.float32)
    coefficients[[0, 2], 2] = 0.5
    table = SamplerTable(timesteps=np.arange(4, 0, -1, dtype=np.float32), coefficients=coefficients)
    assert table.noisy_steps == (True, False, True, False)
    assert list(draws_of_steps(table)) == [1, None, 2, None]


def test_an_image_draws_standard_normals_whatever_its_neighbours() -> None:
    alone, together = (NoiseStream(SampleRequest((0,) * batch, seed=3), (4, 64, 64)) for batch in (1, 3))
    np.testing.assert_array_equal(alone.at(2)[0], together.at(2)[0])
    values = together.at(0).astype(np.float64)
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs(np.mean(values**4) - 3) < 0.15
