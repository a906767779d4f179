"""A request is sampled as asked, or refused with the field, the value and what is allowed; it reaches no file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.core.errors import PolicyError, RequestError
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.serving.orders import Order, OrderBook
from adacorr_deploy.serving.settings import Limits, Quality, RunDefaults, ServingSettings
from adacorr_deploy.serving.tensors import IMAGE_NAMES, INPUTS, Field
from tests.cli.conftest import STEPS
from tests.models import model_spec
from tests.runtime.tiny_dit import SCHEDULE, tiny_spec

COMMANDS = {"command", "stream", "after_step"}
BOOK = OrderBook(
    manifest=Manifest(
        schema_version=1,
        model_name="tiny",
        model=tiny_spec(),
        checkpoint_sha256="0" * 64,
        schedule=SCHEDULE,
        backend="fake",
        parts={},
        files={},
        tool_versions={},
    ),
    settings=ServingSettings(
        model="tiny",
        defaults=RunDefaults(steps=10),
        limits=Limits(max_images=4),
        quality={Quality.EXACT: "none", Quality.BALANCED: "fora@2", Quality.FAST: "fora@3"},
    ),
    policies={},
)


def test_what_is_not_given_is_taken_from_the_repository(book: OrderBook) -> None:
    order = book.order({"class_labels": [0, 2]})
    assert (order.request.labels, order.request.steps, order.request.seed) == ((0, 2), STEPS, 0)
    assert (order.policy.name, order.outputs, order.timeout_seconds) == ("robust", ("png",), None)


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({"quality": "exact"}, "none"),
        ({"quality": "fast"}, "robust@3"),
        ({"policy": "fora@4"}, "fora@4"),
        ({"policy": "fora@4+adacorrection@2"}, "fora@4+adacorrection@2"),
        ({"policy": "taylorseer-2"}, "taylorseer-2"),
        ({"policy": "careful"}, "careful"),
    ],
)
def test_a_policy_is_a_tier_a_preset_or_a_shipped_file(book: OrderBook, fields: dict[str, Field], policy: str) -> None:
    assert book.order({"class_labels": [1], **fields}).policy.name == policy


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "careful.toml", "../careful.toml", "policies/careful.toml", "robust@2/../x.json", "l2c@x.json"],
)
def test_a_request_names_no_file(book: OrderBook, path: str) -> None:
    with pytest.raises(PolicyError, match=r"policy is .*, allowed are none, fewer-steps, .*careful, presets with"):
        book.order({"class_labels": [1], "policy": path})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "class_labels: Field required"),
        ({"class_labels": []}, "class_labels: List should have at least 1 item"),
        ({"class_labels": [0, 3]}, r"class_labels\[1\] is 3, allowed are whole numbers from 0 to 2"),
        ({"class_labels": [0] * 5}, "the number of class_labels is 5, allowed are whole numbers from 1 to 4"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1, got 0"),
        ({"steps": 101}, "steps is 101, allowed are whole numbers from 1 to "),
        ({"guidance": float("nan")}, "guidance: Input should be a finite number, got nan"),
        ({"guidance": 0.5}, "guidance: Input should be greater than or equal to 1, got 0.5"),
        ({"sampler": "euler"}, "sampler: Input should be 'ddim'.* got 'euler'"),
        ({"eta": 2.0}, "eta: Input should be less than or equal to 1, got 2.0"),
        ({"quality": "best"}, "quality: Input should be 'exact', 'balanced' or 'fast', got 'best'"),
        ({"quality": "fast", "policy": "fora"}, "policy and quality were both given"),
        ({"outputs": ["jpeg"]}, "outputs holds 'jpeg', allowed are png, png_base64, pixels, latents"),
        ({"timeout_ms": 0}, "timeout_ms: Input should be greater than or equal to 1, got 0"),
        ({"latents": np.zeros((1, 1, 4, 5), np.float32)}, "latents has shape"),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(fields: dict[str, Field], message: str) -> None:
    complete = fields if "class_labels" in fields or not fields else {"class_labels": [0], **fields}
    with pytest.raises(RequestError, match=message):
        BOOK.order(complete)


VALUES = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.lists(st.integers(-3, 5), max_size=6)
)


@given(
    st.dictionaries(st.sampled_from([field.name for field in INPUTS if field.name not in COMMANDS]), VALUES),
    st.lists(st.sampled_from(IMAGE_NAMES)),
)
def test_whatever_is_sent_is_sampled_or_refused(fields: dict[str, Field], wanted: list[str]) -> None:
    try:
        order = BOOK.order({"class_labels": [1], **fields}, wanted=wanted)
    except (RequestError, PolicyError) as error:
        assert str(error).endswith((".", ")"))  # noqa: PT017  the message is what a client gets
        return
    assert isinstance(order, Order)
    assert 1 <= order.request.steps <= 100
    assert set(order.outputs) <= set(IMAGE_NAMES)


def test_images_of_latents_are_refused() -> None:
    model = model_spec(latent_shape=(4, 4, 4))
    latent = replace(BOOK, manifest=BOOK.manifest.model_copy(update={"model": model}))
    assert latent.order({"class_labels": [0]}).outputs == ("latents",)
    with pytest.raises(
        RequestError, match="outputs holds png, allowed is latents: this model's latents have 4 channels"
    ):
        latent.order({"class_labels": [0], "outputs": ["png"]})


def test_a_tier_that_names_no_preset_stops_the_load(book: OrderBook, version_folder: Path) -> None:
    wrong = book.settings.model_copy(update={"quality": {Quality.FAST: "no-such-preset"}})
    with pytest.raises(PolicyError, match="no-such-preset"):
        OrderBook.of_repository(book.manifest, wrong, version_folder)
