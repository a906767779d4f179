"""A golden sample comes back from its file bit by bit, and nothing comes back that no build writes."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydantic import ValidationError

from adacorr_deploy.core.golden import GoldenSample, largest_golden_bytes
from adacorr_deploy.core.untrusted import first_fault
from tests.models import model_spec

SHAPE = (2, 3, 3)
LATENTS = arrays(np.float32, SHAPE, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def golden(initial: NDArray[np.float32], final: NDArray[np.float32]) -> GoldenSample:
    return GoldenSample(label=7, steps=4, guidance=1.5, tolerance=0.02, initial=initial, final=final)


def text(**changes: object) -> str:
    return json.dumps({**json.loads(golden(*np.zeros((2, *SHAPE), np.float32)).model_dump_json()), **changes})


@given(initial=LATENTS, final=LATENTS)
def test_latents_survive_bit_by_bit(initial: NDArray[np.float32], final: NDArray[np.float32]) -> None:
    again = GoldenSample.model_validate_json(golden(initial, final).model_dump_json())
    for found, written in ((again.initial, initial), (again.final, final)):
        assert found.dtype == np.float32
        assert found.reshape(SHAPE).tobytes() == written.tobytes()
    assert (again.label, again.steps, again.guidance, again.tolerance) == (7, 4, 1.5, 0.02)


@given(side=st.integers(1, 40), channels=st.integers(1, 8))
def test_the_largest_size_is_enough_for_every_model_and_hardly_more(side: int, channels: int) -> None:
    shape = (channels, side, side)
    model = model_spec(latent_shape=shape, patch=(1, 1), num_classes=10**6)
    written = len(golden(*np.full((2, *shape), 1 / 3, np.float32)).model_dump_json())
    assert written <= largest_golden_bytes(model) <= 1.2 * written + 4096


def base64_of(*numbers: float) -> str:
    return base64.b64encode(np.asarray(numbers, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (lambda: "", "Invalid JSON"),
        (lambda: "[]", "top level"),
        (lambda: text(schema_version=2), "schema_version"),
        (lambda: text(extra=1), "extra"),
        (lambda: text(label=-1), "label"),
        (lambda: text(steps=0), "steps"),
        (lambda: text(steps=10**9), "steps"),
        (lambda: text(guidance=0.5), "guidance"),
        (lambda: text(guidance="NaN"), "guidance"),
        (lambda: text(tolerance=0), "tolerance"),
        (lambda: text(tolerance=1.5), "tolerance"),  # which a result of zeros would pass
        (lambda: text(tolerance=None), "tolerance"),
        (lambda: text(initial=None), "initial"),
        (lambda: text(initial=[0.0, 1.0]), "initial"),
        (lambda: text(initial="gASVKAAAAAAAAAC!"), "initial"),
        (lambda: text(final="é"), "final"),
        (lambda: text(final="AAAA"), "final"),  # three bytes
        (lambda: text(final=base64_of(1.0, np.nan)), "final.*NaN or infinite"),
        (lambda: text(final=base64_of(-np.inf)), "final.*NaN or infinite"),
    ],
)
def test_anything_else_is_refused_by_the_field(content: Callable[[], str], fault: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GoldenSample.model_validate_json(content())
    message = first_fault(caught.value)
    assert len(message) < 400
    assert re.search(fault, message)
