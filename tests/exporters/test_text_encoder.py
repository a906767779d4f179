"""The text_encoder part computes what transformers' T5EncoderModel does; one that it can't follow is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5Tokenizer

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.specs import DType, PromptSpec
from adacorr_deploy.core.tokenizer import PromptTokenizer
from adacorr_deploy.engines.backend import Artefact
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.exporters.onnx_parts import export_part
from adacorr_deploy.exporters.text_encoder import LoadedTextEncoder, load_text_encoder
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.runtime.prompt_encoder import PromptEncoder
from tests.exporters.random_text_encoder import random_t5, write_text_encoder

WIDTH = 32
PROMPT = PromptSpec(tokens=40, width=WIDTH)  # long enough for distances of several logarithmic buckets
PROMPTS = (
    "A photo of a red DOG in the park",
    "",
    "  Weiß  Straße\tcafé ﬁne ①½ e\u0301 日本 😀\n",
    "a house, a tree, a bird and a cat " * 8,
)
WEIGHTS = "model.safetensors"


def encoder_in_ort(loaded: LoadedTextEncoder, folder: Path, prompt: PromptSpec = PROMPT) -> PromptEncoder:
    """Export an encoder, and open it as a pipeline does."""
    folder.mkdir(exist_ok=True)
    spec = loaded.spec(prompt)
    part = export_part(loaded.part(prompt), spec.precision, folder)
    backend = OnnxRuntimeBackend(threads=1)
    session = backend.open(Artefact(path=folder / "text_encoder.onnx"), part)
    return PromptEncoder(PromptTokenizer(loaded.tokenizer.content, spec, prompt, where="it"), session, backend)


def in_transformers(
    model: T5EncoderModel, tokenizer: Path, prompts: tuple[str, ...], length: int = PROMPT.tokens
) -> Prompts:
    """Encode as diffusers' PixArt pipelines do without `clean_caption`."""
    words = T5Tokenizer.from_pretrained(tokenizer, local_files_only=True)(
        [prompt.lower().strip() for prompt in prompts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_attention_mask=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        embeddings = model(words.input_ids, attention_mask=words.attention_mask)[0]
    return Prompts(embeddings=embeddings.numpy(), mask=words.attention_mask.numpy())


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["gated-gelu", "relu"])
def test_prompts_are_encoded_as_in_transformers(kind: str, tmp_path: Path) -> None:
    """Upper case, Unicode, the empty prompt, and one of more tokens than the encoder takes."""
    model = random_t5(feed_forward_proj=kind)
    loaded = load_text_encoder(write_text_encoder(tmp_path, model))
    found = encoder_in_ort(loaded, tmp_path / "parts").encode(PROMPTS)
    expected = in_transformers(model, tmp_path / "tokenizer", PROMPTS)
    lengths = expected.mask.sum(axis=1)
    assert lengths[1] == 1  # the end of an empty text
    assert lengths[3] == PROMPT.tokens  # cut off
    np.testing.assert_array_equal(found.mask, expected.mask)
    for row in range(len(PROMPTS)):
        assert relative_error(found.embeddings[row], expected.embeddings[row]) < 1e-4, PROMPTS[row]
    assert relative_error(expected.embeddings[0], expected.embeddings[1]) > 0.1  # the prompt matters


def test_what_pads_a_prompt_changes_no_real_token(tmp_path: Path) -> None:
    """An encoder of another length gives the real tokens the same embeddings."""
    loaded = load_text_encoder(write_text_encoder(tmp_path))
    wide = encoder_in_ort(loaded, tmp_path / "long").encode(["a red dog"])
    narrow = encoder_in_ort(loaded, tmp_path / "short", PromptSpec(tokens=20, width=WIDTH)).encode(["a red dog"])
    real = int(wide.mask.sum())
    assert 5 < real == narrow.mask.sum() < 20
    assert relative_error(narrow.embeddings[:, :real], wide.embeddings[:, :real]) < 1e-5


def test_weights_are_read_in_the_type_that_they_are_stored_in(tmp_path: Path) -> None:
    """Encoders of five billion weights often come in bfloat16: no copy in float32 is made of them."""
    model = random_t5().to(torch.bfloat16)
    loaded = load_text_encoder(write_text_encoder(tmp_path, model))
    assert {weight.dtype for weight in loaded.encoder.parameters()} == {torch.bfloat16}
    found = encoder_in_ort(loaded, tmp_path / "parts").encode(PROMPTS)
    expected = in_transformers(model.float(), tmp_path / "tokenizer", PROMPTS)
    assert relative_error(found.embeddings, expected.embeddings) < 1e-4


def test_the_null_prompt_is_what_float32_makes_of_an_empty_text(tmp_path: Path) -> None:
    """Of weights in bfloat16 too, which stay as they are: a layer's at a time are widened."""
    model = random_t5().to(torch.bfloat16)
    loaded = load_text_encoder(write_text_encoder(tmp_path, model))
    embeddings, mask = loaded.null_prompt(PROMPT)
    expected = in_transformers(model.float(), tmp_path / "tokenizer", ("",))
    np.testing.assert_array_equal(mask, expected.mask[0])
    assert relative_error(embeddings, expected.embeddings[0]) < 1e-5
    assert {weight.dtype for weight in loaded.encoder.parameters()} == {torch.bfloat16}


def test_the_table_of_tokens_may_stand_under_either_name_and_a_decoder_beside_it(tmp_path: Path) -> None:
    folder = write_text_encoder(tmp_path)
    state = load_file(folder / WEIGHTS)
    shared = state.pop("shared.weight")
    save_file({**state, "encoder.embed_tokens.weight": shared, "decoder.x": shared[:1].clone()}, folder / WEIGHTS)
    torch.testing.assert_close(load_text_encoder(folder).encoder.shared.weight, shared, rtol=0, atol=0)


def test_sharded_and_pickled_weights_are_found(tmp_path: Path) -> None:
    model = random_t5()
    folder = write_text_encoder(tmp_path)
    expected = load_text_encoder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_text_encoder(folder)
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    sharded = load_text_encoder(folder)
    for name, value in expected.encoder.state_dict().items():
        assert torch.equal(sharded.encoder.state_dict()[name], value), name
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_text_encoder(folder).encoder.shared.weight, model.shared.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, r"model_type: Input should be 't5'.*--no-text-encoder"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj"),
        ({"num_layers": 10_000}, "num_layers"),
        ({"d_model": -1}, "d_model"),
        ({"vocab_size": 10**9}, "vocab_size"),
        ({"layer_norm_epsilon": "nan"}, "layer_norm_epsilon"),
        ({"relative_attention_max_distance": 8}, "more than a quarter of relative_attention_num_buckets, 8"),
        ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets"),
    ],
)
def test_an_encoder_without_a_compiled_form_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = write_text_encoder(tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_text_encoder(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_text_encoder(tmp_path)
    state = load_file(folder / WEIGHTS)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    lacking = {key: value for key, value in state.items() if key != name}
    wrong = {**state, name: torch.full_like(state[name], torch.nan)}
    for weights, message in ((lacking, f"1 missing: {name}"), (wrong, "holds NaN")):
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            load_text_encoder(folder)
    with pytest.raises(CheckpointError, match=r"holds no config.json. Give a T5 encoder"):
        load_text_encoder(tmp_path / "nowhere")


def test_an_encoder_of_another_width_and_half_precision_are_refused(tmp_path: Path) -> None:
    loaded = load_text_encoder(write_text_encoder(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"embeddings are 32 wide, the model takes 48"):
        loaded.spec(PromptSpec(tokens=8, width=48))
    with pytest.raises(UnsupportedModelError, match=r"overflows in float16. Give --text-precision fp32 or bf16"):
        loaded.spec(PROMPT, DType.FLOAT16)
    assert loaded.spec(PROMPT).precision is DType.FLOAT32
    assert loaded.spec(PROMPT, DType.BFLOAT16).precision is DType.BFLOAT16


def test_a_tokenizer_of_more_tokens_than_the_encoder_is_refused(tmp_path: Path) -> None:
    folder = write_text_encoder(tmp_path, random_t5(vocab_size=20))
    with pytest.raises(CheckpointError, match=r"knows \d+ tokens, the encoder in .* 20"):
        load_text_encoder(folder)


@pytest.mark.trt
@pytest.mark.parametrize("precision", [DType.FLOAT32, DType.BFLOAT16])
def test_it_compiles_with_tensorrt_for_rtx(precision: DType, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    from adacorr_deploy.core.engine_build import CompilerOptions
    from adacorr_deploy.engines.tensorrt_compiler import TensorRTCompiler
    from adacorr_deploy.engines.tensorrt_modules import TENSORRT_RTX

    loaded = load_text_encoder(write_text_encoder(tmp_path))
    part = export_part(loaded.part(PROMPT), loaded.spec(PROMPT, precision).precision, tmp_path)
    compiler = TensorRTCompiler(TENSORRT_RTX, CompilerOptions(targets=("sm_86", "sm_120")))
    assert compiler.compile(tmp_path / "text_encoder.onnx", part, tmp_path / "engines").path.stat().st_size > 0
