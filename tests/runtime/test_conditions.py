"""What a request says beside labels is checked, and becomes the rows that parts take by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.latents import LatentSize, LatentSpec
from adacorr_deploy.core.samplers import Sampler
from adacorr_deploy.core.schedules import DynamicShift, FlowSchedule, NoiseSchedule
from adacorr_deploy.core.specs import ConditionSpec, PromptSpec, request_tensors
from adacorr_deploy.runtime.conditions import Prompts, check_negative, condition_rows
from adacorr_deploy.runtime.example_requests import example_prompts, example_request
from adacorr_deploy.runtime.request import NoiseStream, SampleRequest, check_request, table_from_request
from tests.models import model_spec

PROMPT = PromptSpec(tokens=4, width=3)
SCHEDULE = NoiseSchedule(betas=(0.1,) * 20)
LABELLED = model_spec()
CLIPS = replace(
    LABELLED,
    latents=LatentSpec(shape=(2, 4, 4, 6), patch=(1, 2, 2), largest=(8, 8, 12), smallest=(4, 4, 6)),
    conditions=ConditionSpec(prompt=PROMPT, frame_rate=True),
)


def asked(**changes: object) -> SampleRequest:
    request = example_request(CLIPS, SampleRequest(steps=4, guidance=2.0), range(2))
    return cast(Callable[..., SampleRequest], replace)(request, **changes)


def prompts(**changes: object) -> Prompts:
    return cast(Callable[..., Prompts], replace)(example_prompts(PROMPT, range(2)), **changes)


def test_rows_are_named_and_shaped_as_the_model_says() -> None:
    request = asked(size=(5, 6, 8))
    check_request(request, CLIPS, SCHEDULE)
    rows = condition_rows(request, CLIPS, None)
    sizes = {"rows": 4, "steps": 4, **CLIPS.latents.sizes_at(request.size)}
    expected = {name: tensor for name, tensor in request_tensors(CLIPS).items() if name != "timesteps"}
    assert rows.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (rows[name].shape, rows[name].dtype) == (tensor.resolved(sizes), tensor.dtype.numpy)
    np.testing.assert_array_equal(rows["frame_positions"], np.arange(5))
    np.testing.assert_array_equal(rows["latent_size"], [5, 6, 8])


@pytest.mark.parametrize("images", [1, 2])
def test_rows_without_condition_have_the_requests_negative_prompt_or_the_bundles(images: int) -> None:
    given = example_prompts(PROMPT, range(2))
    null = example_prompts(PROMPT, [7])
    request = asked(prompts=replace(given, negative=None))
    taken = condition_rows(request, CLIPS, null)["prompt_embeddings"]
    np.testing.assert_array_equal(taken, np.concatenate([given.embeddings, null.embeddings, null.embeddings]))
    negative = example_prompts(PROMPT, range(3, 3 + images))
    own = condition_rows(asked(prompts=replace(given, negative=negative)), CLIPS, null)
    np.testing.assert_array_equal(own["prompt_mask"][2:], np.repeat(negative.mask, 2 // images, axis=0))
    with pytest.raises(RequestError, match=r"the bundle holds none. Give prompts.negative"):
        check_negative(request, has_null_prompt=False)
    check_negative(replace(request, guidance=1.0), has_null_prompt=False)


def test_where_masks_are_shared_rows_without_condition_have_their_images_own() -> None:
    shared = replace(CLIPS, conditions=ConditionSpec(prompt=replace(PROMPT, shared_mask=True), frame_rate=True))
    request = asked()
    assert request.prompts is not None
    rows, own = condition_rows(request, shared, None), condition_rows(request, CLIPS, None)
    np.testing.assert_array_equal(rows["prompt_mask"], np.concatenate([request.prompts.mask] * 2))
    np.testing.assert_array_equal(rows["prompt_embeddings"], own["prompt_embeddings"])
    assert not np.array_equal(rows["prompt_mask"], own["prompt_mask"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (asked(prompts=None), "prompts is missing: this model takes embeddings of 4 tokens of width 3"),
        (asked(labels=(1, 2)), "labels are given, and this model takes none"),
        (asked(prompts=prompts(embeddings=np.zeros((2, 4, 2), np.float32))), r"embeddings is float32 \(2, 4, 2\)"),
        (asked(prompts=prompts(embeddings=np.full((2, 4, 3), np.nan, np.float32))), "holds 24 values that are NaN"),
        (asked(prompts=prompts(mask=np.ones((2, 4), np.float32))), r"mask is float32 \(2, 4\), allowed is a int64"),
        (asked(prompts=prompts(mask=np.zeros((2, 4), np.int64))), "or a prompt without a real token"),
        (asked(prompts=prompts(mask=np.ones((1, 4), np.int64))), "2 embeddings and 1 masks"),
        (asked(prompts=prompts(negative=example_prompts(PROMPT, range(3)))), "holds 3 prompts, allowed are 1"),
        (asked(frame_rate=None), "frame_rate is None, allowed is more than 0"),
        (asked(frame_rate=float("nan")), "frame_rate is nan"),
        (
            asked(size=(4, 4)),
            r"size is \(4, 4\), allowed are whole numbers of latent pixels: \(frames, ",
        ),
        (asked(size=(4, 5, 6)), r"height is 5 latent pixels, this model takes 4 … 8, in multiples of 2"),
        (asked(size=(9, 4, 6)), r"frames is 9 latent pixels, this model takes 4 … 8"),
        (asked(size="446"), "size is '446'"),
    ],
)
def test_what_a_model_does_not_take_is_refused(request_: SampleRequest, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_request(request_, CLIPS, SCHEDULE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": prompts()}, "prompts are given, and this model takes none"),
        ({"frame_rate": 8.0}, "frame_rate is given, and this model takes none"),
        ({"size": (4, 6)}, "width is 6 latent pixels, this model takes 4 alone"),
    ],
)
def test_a_model_of_labels_takes_labels_alone(changes: dict[str, object], message: str) -> None:
    request = cast(Callable[..., SampleRequest], replace)(SampleRequest((1, 2), steps=4), **changes)
    with pytest.raises(RequestError, match=message):
        check_request(request, LABELLED, SCHEDULE)


@pytest.mark.parametrize("size", [None, (4, 8, 12)])
def test_noise_and_the_dynamic_shift_follow_the_size(size: LatentSize | None) -> None:
    request = asked(size=size, sampler=Sampler.FLOW_EULER)
    shape = (2, 2, *(size or (4, 4, 6)))
    assert NoiseStream(request, request.latent_shape(CLIPS)).at(0).shape == shape
    shift = DynamicShift(base_tokens=16, max_tokens=256)
    table = table_from_request(request, CLIPS, FlowSchedule(flow_steps=1000, dynamic_shift=shift))
    factor, middle = shift.factor(CLIPS.latents.tokens_at(size)), 1 - 1 / 3 * (1 - 1 / 1000)
    assert table.timesteps[1] == pytest.approx(1000 * factor * middle / (1 + (factor - 1) * middle), rel=1e-5)
