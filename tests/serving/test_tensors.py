"""What arrives as tensors is told apart by name; text and numbers keep their values."""

from __future__ import annotations

import numpy as np
import pytest

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.serving.tensors import INPUTS, OUTPUTS, Tensors, fields_from_tensors, text_tensor


def test_every_value_arrives_as_it_was_sent() -> None:
    tensors: Tensors = {
        "class_labels": np.array([2, 0], dtype=np.int64),
        "seed": np.array([2**64 - 1], dtype=np.uint64),
        "guidance": np.array([4.1], dtype=np.float64),
        "policy": text_tensor(["robust@2"]),
        "outputs": text_tensor(["png", "latents"]),
    }
    assert fields_from_tensors(tensors) == {
        "class_labels": [2, 0],
        "seed": 2**64 - 1,
        "guidance": 4.1,  # of a single precision tensor it would be another, and find no calibration
        "policy": "robust@2",
        "outputs": ["png", "latents"],
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"colour": np.array([1])}, "colour is no field of a request. Known: class_labels, "),
        ({"seed": np.array([1, 2])}, "seed holds 2 values, allowed is 1"),
        ({"seed": np.array([], dtype=np.uint64)}, "seed holds 0 values, allowed is 1"),
        ({"policy": text_tensor([b"\xff"])}, "policy is not UTF-8 text"),
    ],
)
def test_what_is_no_field_is_refused_by_name(tensors: Tensors, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fields_from_tensors(tensors)


def test_names_are_unique() -> None:
    for table in (INPUTS, OUTPUTS):
        assert len({field.name for field in table}) == len(table)
