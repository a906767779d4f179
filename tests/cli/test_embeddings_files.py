"""A file of embeddings becomes prompts, or one line says why not; nothing that was asked for is passed over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from adacorr_deploy.cli.prompts import Asked, prompts_asked_for, prompts_from_embeddings
from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.specs import PromptSpec
from adacorr_deploy.runtime import Pipeline
from adacorr_deploy.runtime.conditions import Prompts

PROMPT = PromptSpec(tokens=5, width=12)
Tensors = dict[str, NDArray[np.generic]]


def tensors(prompts: int = 2) -> Tensors:
    values = np.arange(prompts * 60, dtype=np.float32).reshape(prompts, 5, 12)
    return {"prompt_embeddings": values, "prompt_mask": np.ones((prompts, 5), np.int64)}


def negative(prompts: int = 1) -> Tensors:
    return {name.replace("prompt", "negative"): tensor for name, tensor in tensors(prompts).items()}


def saved(folder: Path, content: Tensors) -> Path:
    save_file(content, folder / "e.safetensors")
    return folder / "e.safetensors"


@dataclass(frozen=True)
class Encoder:
    """What `prompts_asked_for` needs of a pipeline."""

    def encode(self, prompts: Sequence[str], negative: Sequence[str] = ()) -> Prompts:
        found = {name: tensor[: len(prompts)] for name, tensor in tensors(len(prompts)).items()}
        return Prompts(
            embeddings=cast("NDArray[np.float32]", found["prompt_embeddings"]),
            mask=cast("NDArray[np.int64]", found["prompt_mask"]),
            negative=self.encode(negative) if negative else None,
        )

    @property
    def manifest(self) -> object:
        return SimpleNamespace(model_name="m", model=SimpleNamespace(conditions=SimpleNamespace(prompt=PROMPT)))


PIPELINE = cast("Pipeline", Encoder())


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("mask", [np.int64, np.uint8, np.bool_])
def test_what_a_file_holds_is_what_is_read(kind: type[np.floating], mask: type[np.generic], tmp_path: Path) -> None:
    expected = {**tensors(), **negative()}
    content = {name: tensor.astype(mask if "mask" in name else kind) for name, tensor in expected.items()}
    found = prompts_from_embeddings(saved(tmp_path, content), PROMPT)
    np.testing.assert_array_equal(found.embeddings, expected["prompt_embeddings"])
    assert found.embeddings.dtype == np.dtype(np.float32)
    assert found.mask.dtype == np.dtype(np.int64)
    assert found.negative is not None
    np.testing.assert_array_equal(found.negative.embeddings, expected["negative_embeddings"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_embeddings": np.ones((2, 5, 12), np.int32)}, "is int32, allowed are float32, float16 and float64"),
        ({"prompt_embeddings": np.ones((2, 6, 12), np.float32)}, r"allowed is a float32 array of shape \(B, 5, 12\)"),
        ({"prompt_embeddings": np.ones((), np.float32)}, r"allowed is a float32 array of shape \(B, 5, 12\)"),
        ({"prompt_embeddings": np.full((2, 5, 12), np.nan, np.float32)}, "120 values that are NaN or infinite"),
        ({"prompt_embeddings": np.full((2, 5, 12), 1e300)}, "120 values that are NaN or infinite"),
        ({"prompt_mask": np.full((2, 5), 2**63, np.uint64)}, "mask holds other numbers than 0 and 1"),
        ({"prompt_mask": np.ones((2, 5), np.float32)}, "is float32, allowed are whole numbers"),
        ({"prompt_mask": np.ones((1, 5), np.int64)}, "2 embeddings and 1 masks"),
        ({"negative_mask": np.ones((2, 5), np.int64)}, "lacks the tensor negative_embeddings"),
        ({"\x1b[31m": np.ones(3)}, r"holds a tensor '\\x1b\[31m', allowed are prompt_embeddings"),
        (tensors(1025), "holds 1025 prompts, allowed are 1024"),
    ],
)
def test_other_tensors_are_refused(change: Tensors, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {**tensors(), **change})
    with warnings.catch_warnings(record=True) as said, pytest.raises(RequestError, match=message):
        prompts_from_embeddings(path, PROMPT)
    assert not said  # the message is all


def test_a_type_that_numpy_lacks_is_named_with_those_that_are_read(tmp_path: Path) -> None:
    header = json.dumps({"prompt_embeddings": {"dtype": "BF16", "shape": [1, 5, 12], "data_offsets": [0, 120]}})
    (tmp_path / "e.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(120))
    with pytest.raises(RequestError, match="NumPy has no BF16, allowed are F32, F16 and F64"):
        prompts_from_embeddings(tmp_path / "e.safetensors", PROMPT)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x80\x04K\x01.", (2**62).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.safetensors").write_bytes(content)
    with pytest.raises(RequestError, match=r"can't be read as embeddings: .* Give a safetensors file"):
        prompts_from_embeddings(tmp_path / "e.safetensors", PROMPT)


def test_negatives_from_two_places_or_without_guidance_are_refused(tmp_path: Path) -> None:
    both = Asked(embeddings=saved(tmp_path, {**tensors(), **negative()}), negative=("fog",))
    with pytest.raises(RequestError, match=r"--negative-prompt is given, and .* holds negative_embeddings, too"):
        prompts_asked_for(PIPELINE, both, labels=False, guidance=4.0)
    unused = Asked(prompts=("a dog",), negative=("fog",))
    with pytest.raises(RequestError, match="--negative-prompt is given, and guidance 1 leads away from nothing"):
        prompts_asked_for(PIPELINE, unused, labels=False, guidance=1.0)
    found = prompts_asked_for(PIPELINE, unused, labels=False, guidance=4.0)
    assert found is not None
    assert found.negative is not None
