"""A served model that takes text: what its requests may have, how they are checked, and what a real server gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.core.bundle import Bundle
from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.serving.local_server import installed_triton
from adacorr_deploy.serving.orders import OrderBook
from adacorr_deploy.serving.prompt_desk import Texts
from adacorr_deploy.serving.repository import Repository
from adacorr_deploy.serving.tensors import Field, inputs_for
from adacorr_deploy.serving.trial_server import RunningServer, refusal, running
from tests.exporters.random_pixart import PROMPT_WIDTH
from tests.text_to_image import SCALE, SIDE, TOKENS

EXACT: dict[str, Field] = {"policy": "none", "steps": 4}


def embeddings(count: int) -> Prompts:
    shape = (count, TOKENS, PROMPT_WIDTH)
    return Prompts(embeddings=np.full(shape, 0.5, np.float32), mask=np.ones(shape[:2], np.int64))


def book_of(bundle: Bundle, repository: Repository) -> OrderBook:
    return OrderBook.of_repository(bundle.manifest, repository.settings, repository.path / "pixart" / "1")


# --- Orders ------------------------------------------------------------------------------------------------------


def test_a_repository_takes_what_its_model_takes(
    text_bundle: Bundle, text_repository: Repository, served_bundle: Bundle
) -> None:
    of_text, of_classes = ({field.name for field in inputs_for(each.manifest)} for each in (text_bundle, served_bundle))
    texts = {"prompts", "negative_prompts", "prompt_embeddings", "prompt_mask", "negative_embeddings", "negative_mask"}
    assert of_text - of_classes == {*texts, "size"}
    assert of_classes - of_text == {"class_labels"}
    config = (text_repository.path / "pixart" / "config.pbtxt").read_text()
    assert '"prompts"' in config
    assert '"class_labels"' not in config
    assert "tokenizers==" in (text_repository.path / "requirements-cpu.txt").read_text()
    page = (text_repository.path / "README.md").read_text()
    assert "python client.py --prompt 'a red dog' --quality fast" in page
    assert "| `size` | pixels: a width of 4 … 32, in multiples of 4; a height of 4 … 32, in multiples of 4 |" in page


def test_an_order_keeps_the_prompts_that_are_to_be_encoded(text_bundle: Bundle, text_repository: Repository) -> None:
    book = book_of(text_bundle, text_repository)
    asked: dict[str, Field] = {"prompts": ["a dog", "a cat"], "negative_prompts": [""], "size": [24, 16]}
    order = book.order(asked)
    assert order.request.batch == 2
    assert order.request.size == (16 // SCALE, 24 // SCALE)
    assert order.texts == Texts(prompts=("a dog", "a cat"), negative=("",))
    for wrong in ({"steps": 0}, {"policy": "nonsense"}, {"outputs": ["nonsense"]}, {"size": [1, 1]}):
        with pytest.raises(Exception, match=r"allowed|takes|greater"):
            book.order({**asked, **wrong})


class Given(TypedDict, total=False):
    prompt_embeddings: NDArray[np.float32]
    prompt_mask: NDArray[np.int64]


ONE = embeddings(1)
GIVEN: dict[str, Field] = {"prompt_embeddings": ONE.embeddings, "prompt_mask": ONE.mask}


def test_embeddings_need_no_encoder(text_bundle: Bundle, text_repository: Repository) -> None:
    book = book_of(text_bundle, text_repository)
    order = book.order({**GIVEN, "negative_embeddings": ONE.embeddings, "negative_mask": ONE.mask})
    assert order.texts is None
    assert order.request.prompts is not None
    assert order.request.prompts.negative is not None
    np.testing.assert_array_equal(order.request.prompts.embeddings, ONE.embeddings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Both prompts and embeddings, or neither, were given; allowed are prompts, or prompt_embeddings"),
        ({"prompts": ["a"], **GIVEN}, "Both prompts and embeddings, or neither"),
        ({"prompts": []}, "prompts: List should have at least 1 item"),
        ({"prompts": ["a", "x" * 10_001]}, "prompts[1] has 10001 characters, allowed are 10000"),
        ({"prompts": ["a"] * 5}, "the number of prompts is 5, allowed are whole numbers from 1 to 4"),
        ({"prompts": ["a"], "negative_prompts": ["b"] * 2}, "prompts.negative holds 2 prompts, allowed are 1"),
        ({"prompts": ["a"], "prompt_mask": ONE.mask}, "prompts go with negative_prompts, embeddings with masks"),
        ({**GIVEN, "negative_prompts": ["a"]}, "prompts go with negative_prompts, embeddings with masks"),
        ({"prompt_embeddings": ONE.embeddings}, "prompt_embeddings and prompt_mask go together"),
        ({**GIVEN, "negative_mask": ONE.mask}, "negative_embeddings and negative_mask go together"),
        (
            {**GIVEN, "prompt_embeddings": ONE.embeddings[:, 1:]},
            f"float32 array of shape (B, {TOKENS}, {PROMPT_WIDTH})",
        ),
        ({**GIVEN, "prompt_embeddings": ONE.embeddings * np.nan}, "that are NaN or infinite"),
        ({**GIVEN, "prompt_mask": ONE.mask * 2}, "mask holds other numbers than 0 and 1"),
        ({"prompts": ["a"], "class_labels": [1]}, "class_labels is given, and this model takes none. It takes prompts"),
        ({"prompts": ["a"], "size": [22, 16]}, "size: width is 22 pixels, this model takes 4 … 32, in multiples of 4"),
        ({"prompts": ["a"], "size": [16]}, "size is [16], allowed is a width and a height"),
        ({"prompts": ["a"], "frames": 3}, "frames is 3, and this model makes no clips"),
        ({"prompts": ["a"], "frame_rate": 8.0}, "frame_rate is given, and this model takes none"),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    fields: dict[str, Field], message: str, text_bundle: Bundle, text_repository: Repository
) -> None:
    with pytest.raises(RequestError) as refused:
        book_of(text_bundle, text_repository).order(fields)
    assert message in str(refused.value)


def test_a_model_of_classes_takes_no_prompts(book: OrderBook) -> None:
    with pytest.raises(RequestError, match=r"prompts is given, and this model takes none. It takes class_labels"):
        book.order({"prompts": ["a"], "class_labels": [0]})
    with pytest.raises(RequestError, match="class_labels: Field required, whole numbers from 0 to 2"):
        book.order({})


# --- A real server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(text_repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(installed_triton(), text_repository, tmp_path_factory.mktemp("server") / "log") as started:
        yield started


def in_process(bundle: Bundle, prompt: str, **request: object) -> NDArray[np.float32]:
    """Return what the same request comes to in this process, alone."""
    with Pipeline.open(bundle.path) as pipeline:
        made = SampleRequest(prompts=pipeline.encode([prompt]), steps=4, **request)  # type: ignore[arg-type]
        return sample_with_policy(pipeline, made, PRESETS["none"]).latents


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_served_prompt_gives_what_it_gives_in_process(server: RunningServer, text_bundle: Bundle) -> None:
    """Prompts, their embeddings, Unicode over JSON, sizes, and refusals, each through the real server."""
    dog = server.latents({"prompts": ["A red dog"], **EXACT})
    assert relative_error(dog, in_process(text_bundle, "a red dog")) < 1e-5
    both = server.latents({"prompts": ["a blue cat", "a red dog"], **EXACT})
    assert relative_error(both[:1], dog) > 1e-2
    wide = server.latents({"prompts": ["Weiß, 日本 😀"], "size": [24, 16], **EXACT})
    assert relative_error(wide, in_process(text_bundle, "weiß, 日本 😀", size=(SIDE, 12))) < 1e-5
    with Pipeline.open(text_bundle.path) as pipeline:
        prompts = pipeline.encode(["a red dog"])
    given: dict[str, Field] = {"prompt_embeddings": prompts.embeddings, "prompt_mask": prompts.mask}
    assert relative_error(server.latents({**given, **EXACT}), dog) < 1e-5
    pixels = server.infer({"prompts": ["a red dog"], **EXACT}, "pixels").as_numpy("pixels")
    assert pixels.shape == (1, SCALE * SIDE, SCALE * SIDE, 3)
    code, body = server.post(f"{server.model}/generate", {"prompts": ["a red dog"], **EXACT, "outputs": ["png_base64"]})
    assert code == 200, body
    for fields, message in (
        ({"prompts": ["x" * 10_001]}, "prompts[0] has 10001 characters, allowed are 10000"),
        ({"prompts": ["a"], "size": [22, 16]}, "size: width is 22 pixels, this model takes 4"),
        ({"class_labels": [0]}, "unexpected inference input 'class_labels'"),
    ):
        with pytest.raises(Exception, match=r".") as refused:
            server.infer(fields)  # type: ignore[arg-type]
        assert message in refusal(refused.value)[1]


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_client_script_is_given_the_same_images_for_embeddings_as_for_their_prompt(
    server: RunningServer, text_bundle: Bundle, text_repository: Repository, tmp_path: Path
) -> None:
    with Pipeline.open(text_bundle.path) as pipeline:
        prompts = pipeline.encode(["a red dog"])
    save_file({"prompt_embeddings": prompts.embeddings, "prompt_mask": prompts.mask}, tmp_path / "dog.safetensors")
    script = [sys.executable, str(text_repository.path / "client.py"), "--server", server.grpc_address]
    images = []
    for name, asked in (("text", ["--prompt", "a red dog"]), ("file", ["--embeddings", "dog.safetensors"])):
        run = [*script, *asked, "--size", "24", "16", "--policy", "none", "--steps", "4", "--output", name]
        subprocess.run(run, check=True, timeout=60, cwd=tmp_path)
        (file,) = (tmp_path / name).iterdir()
        assert file.name == "00_prompt.png"
        images.append(np.asarray(Image.open(file), dtype=np.int64))
    assert images[0].shape == (16, 24, 3)
    assert np.abs(images[0] - images[1]).max() <= 1  # encoded here, and there
