"""Invariant: what the client script sends is what the server takes, for every kind of model and as the README shows."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tritonclient.grpc as triton
from safetensors.numpy import save_file
from tritonclient.utils import deserialize_bytes_tensor

from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters.bundle_builder import BuildOptions, build_bundle
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.runtime.example_requests import example_prompts
from adacorr_deploy.serving.orders import Order, OrderBook
from adacorr_deploy.serving.repository import Repository, RepositoryOptions, write_repository
from adacorr_deploy.serving.settings import Quality
from adacorr_deploy.serving.tensors import IMAGE_NAMES, INPUTS, Tensor, fields_from_tensors
from tests.cli.conftest import run_main
from tests.cli.test_prompts import write_embeddings
from tests.families.instances import loaded_family
from tests.text_to_image import write_text_to_image

DTYPES = {"INT64": np.int64, "UINT64": np.uint64, "FP64": np.float64, "FP32": np.float32}
IMAGE = b"\x89PNG, or what would be one"

Ask = Callable[[Repository, Bundle, Sequence[str]], Order]


class Server:
    """Stands for the connection: keeps what is sent, and answers with an image for each that is asked for."""

    def __init__(self) -> None:
        self.sent: dict[str, Tensor] = {}
        self.wanted: list[str] = []

    def infer(
        self, model: str, inputs: Sequence[triton.InferInput], outputs: Sequence[triton.InferRequestedOutput]
    ) -> Server:
        assert model
        self.sent = {each.name(): _tensor(each) for each in inputs}
        self.wanted = [each.name() for each in outputs]
        return self

    def as_numpy(self, name: str) -> Tensor:
        asked = ("class_labels", "prompts", "prompt_embeddings")
        images = next(len(self.sent[each]) for each in asked if each in self.sent)
        answers: dict[str, Tensor] = {
            "png": np.array([IMAGE] * images, dtype=np.object_),
            "latents": np.ones((images, 1), dtype=np.float32),
            "policy": np.array([b"none"], dtype=np.object_),
        }
        return answers.get(name, np.ones(1))


def _tensor(given: triton.InferInput) -> Tensor:
    (field,) = [field for field in INPUTS if field.name == given.name()]
    assert given.datatype() == field.datatype.replace("STRING", "BYTES")
    assert len(given.shape()) == len(field.dims)
    content = given._get_content()
    if given.datatype() == "BYTES":
        texts: Tensor = deserialize_bytes_tensor(content)
        return texts
    return np.frombuffer(content, DTYPES[given.datatype()]).reshape(given.shape())


def script_of(repository: Repository) -> ModuleType:
    spec = importlib.util.spec_from_file_location("client", repository.path / "client.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run the script in `tmp_path`, check what it sent as the server does, and return the order."""

    def run_script(repository: Repository, bundle: Bundle, words: Sequence[str]) -> Order:
        server = Server()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(triton, "InferenceServerClient", lambda address: server)
        monkeypatch.setattr(sys, "argv", ["client.py", *words])
        script_of(repository).main()
        book = OrderBook.of_repository(bundle.manifest, repository.settings, repository.path / repository.model / "1")
        return book.order(
            fields_from_tensors(server.sent), wanted=[name for name in server.wanted if name in IMAGE_NAMES]
        )

    return run_script


@pytest.fixture(scope="module")
def bare_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of a model that takes text, without a text encoder."""
    folder = tmp_path_factory.mktemp("bare")
    pipeline = write_text_to_image(folder / "pixart", text_encoder=False)
    assert run_main("build", pipeline, "-o", folder / "bare.bundle", "--policy", "fora") == 0
    return open_bundle(folder / "bare.bundle")


@pytest.fixture(scope="module")
def bare_repository(bare_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return write_repository(bare_bundle.path, tmp_path_factory.mktemp("repository") / "models", RepositoryOptions())


def prompts_of(bundle: Bundle) -> Prompts:
    prompt = bundle.manifest.model.conditions.prompt
    assert prompt is not None
    return example_prompts(prompt, range(2))


def shown(repository: Repository) -> list[str]:
    """Return the words that the README has after the script's name."""
    found = re.search(r"python client\.py (.*)", (repository.path / "README.md").read_text())
    assert found is not None
    return shlex.split(found[1])


def test_what_the_readme_shows_is_taken(
    ask: Ask,
    repository: Repository,
    served_bundle: Bundle,
    text_repository: Repository,
    text_bundle: Bundle,
    bare_repository: Repository,
    bare_bundle: Bundle,
    tmp_path: Path,
) -> None:
    assert ask(repository, served_bundle, shown(repository)).request.labels == (0, 2)  # of the three that there are
    of_text = ask(text_repository, text_bundle, shown(text_repository))
    assert of_text.texts is not None
    assert of_text.texts.prompts == ("a red dog",)
    prompts = prompts_of(bare_bundle)
    write_embeddings(tmp_path / "FILE.safetensors", prompts, prompts.negative)
    of_embeddings = ask(bare_repository, bare_bundle, shown(bare_repository))
    assert of_embeddings.request.batch == 2
    assert of_embeddings.policy.name == bare_repository.settings.quality[Quality.FAST]
    assert "pip install 'tritonclient[grpc]' safetensors &&" in (bare_repository.path / "README.md").read_text()


def test_embeddings_arrive_as_they_stand_in_the_file(
    ask: Ask, bare_repository: Repository, bare_bundle: Bundle, tmp_path: Path
) -> None:
    prompts = prompts_of(bare_bundle)
    half = {"prompt_embeddings": prompts.embeddings.astype(np.float16), "prompt_mask": prompts.mask.astype(np.bool_)}
    write_embeddings(tmp_path / "half.safetensors", prompts, prompts.negative, **half)
    given = ask(bare_repository, bare_bundle, ["--embeddings", "half.safetensors", "--seed", "7"]).request
    assert given.prompts is not None
    assert given.prompts.negative is not None
    assert prompts.negative is not None
    assert given.seed == 7
    np.testing.assert_array_equal(given.prompts.embeddings, prompts.embeddings.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(given.prompts.mask, prompts.mask)
    np.testing.assert_array_equal(given.prompts.negative.embeddings, prompts.negative.embeddings)
    np.testing.assert_array_equal(given.prompts.negative.mask, prompts.negative.mask)
    images = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in images] == ["00_prompt.png", "01_prompt.png"]
    assert {path.read_bytes() for path in images} == {IMAGE}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompts": np.ones(1)}, r"it holds 'prompts', allowed are prompt_embeddings, prompt_mask, negative_emb"),
        ({"prompt_mask": np.full((1, 2), 0.5)}, r"Cannot cast .* from dtype\('float64'\) to dtype\('int64'\)"),
        (None, "No such file"),
    ],
)
def test_a_file_of_something_else_is_one_line(
    tensors: dict[str, Tensor] | None,
    message: str,
    ask: Ask,
    bare_repository: Repository,
    bare_bundle: Bundle,
    tmp_path: Path,
) -> None:
    if tensors is not None:
        save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit, match=rf"^error: x\.safetensors can't be read as embeddings: .*{message}") as ended:
        ask(bare_repository, bare_bundle, ["--embeddings", "x.safetensors"])
    assert len(str(ended.value).splitlines()) == 1
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
def test_of_clips_their_frames_and_rate_are_sent_and_latents_are_kept_where_nothing_makes_images(
    ask: Ask, tmp_path: Path
) -> None:
    backend, options = OnnxRuntimeBackend(threads=1), BuildOptions(default_policy="none")
    bundle = build_bundle(loaded_family("stdit"), tmp_path / "stdit.bundle", backend, options)
    repository = write_repository(bundle.path, tmp_path / "models", RepositoryOptions())
    prompts = prompts_of(bundle)
    write_embeddings(tmp_path / "FILE.safetensors", prompts, prompts.negative)
    order = ask(repository, bundle, [*shown(repository), "--frames", "2"])
    assert order.request.frame_rate == 24.0
    assert order.request.size is not None
    assert order.request.size[0] == 2
    assert order.outputs == ("latents",)
    assert np.load(tmp_path / "images" / "latents.npy").shape == (2, 1)
