"""A T5 encoder as the `text_encoder` part: the tokens of one prompt → its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adacorr_deploy.core.errors import CheckpointError, UnsupportedModelError
from adacorr_deploy.core.prompts import TEXT_ENCODER_PART, TextEncoderSpec, text_encoder_spec
from adacorr_deploy.core.specs import DType, PromptSpec
from adacorr_deploy.core.tokenizer import PromptTokenizer
from adacorr_deploy.exporters.config_files import folder_in_pipeline, json_object
from adacorr_deploy.exporters.part import Part
from adacorr_deploy.exporters.t5_config import T5Config
from adacorr_deploy.exporters.tokenizer_files import TokenizerJson, load_tokenizer
from adacorr_deploy.exporters.weight_files import (
    StateDict,
    checkpoint_sha256,
    require_tensors,
    state_dict_from_files,
    weight_files,
)

if TYPE_CHECKING:
    from transformers import T5EncoderModel
    from transformers.models.t5.modeling_t5 import T5Attention

_WEIGHTS_NAMES: Final = ("model", "pytorch_model")  # of transformers' weight files
_SHARED: Final = "shared.weight"
_TIED: Final = "encoder.embed_tokens.weight"  # the same table, under the name that some checkpoints store alone
_MASKED: Final = -1e9  # a score whose exponential is 0 beside any other's, in every precision


class TextEncoderPart(nn.Module):
    """Tokens → embeddings, from the encoder's own modules, for prompts of one length."""

    def __init__(self, encoder: T5EncoderModel, *, tokens: int) -> None:
        super().__init__()
        stack = encoder.encoder
        self.embed_tokens = encoder.shared
        self.blocks = stack.block
        self.final_layer_norm = stack.final_layer_norm
        self._buckets = _distance_buckets(self._first_attention, tokens)

    @property
    def _first_attention(self) -> T5Attention:
        """The attention that holds the position biases of all blocks."""
        attention: T5Attention = self.blocks[0].layer[0].SelfAttention
        return attention

    def forward(self, prompt_tokens: Tensor, prompt_mask: Tensor) -> tuple[Tensor, ...]:
        """Return embeddings, (R, T, E) float32, of `prompt_tokens` (R, T) int64; `prompt_mask` is 1 where one is real.

        Padding is encoded too, as the original does; what reads the embeddings masks it.
        """
        x = self.embed_tokens(prompt_tokens)
        real = (prompt_mask != 0)[:, None, None, :]
        bias = torch.where(real, self._position_bias(), _MASKED)
        for block in self.blocks:
            attention, feed_forward = block.layer
            x = x + _attended(attention.SelfAttention, attention.layer_norm(x), bias)
            x = feed_forward(x)
        return (self.final_layer_norm(x).float(),)

    def _position_bias(self) -> Tensor:
        """Return what is added to the scores, (1, heads, T, T) float32: it depends on the distance alone."""
        tokens = (len(self._buckets) + 1) // 2
        of_distances = self._first_attention.relative_attention_bias(torch.tensor(self._buckets))
        positions = torch.arange(tokens)
        distances = positions[None, :] - positions[:, None] + (tokens - 1)
        return functional.embedding(distances, of_distances).permute(2, 0, 1)[None].float()


def _distance_buckets(attention: T5Attention, tokens: int) -> tuple[int, ...]:
    """Return the bucket of every distance 1 − T … T − 1, as the original computes it.

    They are constants of the graph: computed there, another backend's logarithm could round to a neighbouring bucket.
    """
    with torch.device("cpu"):
        buckets: Tensor = attention._relative_position_bucket(
            torch.arange(1 - tokens, tokens),
            bidirectional=True,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
    return tuple(int(bucket) for bucket in buckets)


def _attended(attention: T5Attention, x: Tensor, bias: Tensor) -> Tensor:
    """Return the attention's result, (R, T, E): T5 doesn't scale its scores, and softmax is in float32 throughout."""
    rows, tokens, _ = x.shape
    query, key, value = (
        projection(x).reshape(rows, tokens, attention.n_heads, attention.key_value_proj_dim).transpose(1, 2)
        for projection in (attention.q, attention.k, attention.v)
    )
    weights = ((query @ key.transpose(-1, -2)).float() + bias).softmax(dim=-1).to(value.dtype)
    result: Tensor = attention.o((weights @ value).transpose(1, 2).reshape(rows, tokens, attention.inner_dim))
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTextEncoder:
    """A text encoder and its tokenizer in memory, checked."""

    where: str  # its folder, for messages
    encoder: T5EncoderModel  # of float32, float16 or bfloat16 weights, as they are stored
    config: T5Config
    tokenizer: TokenizerJson
    sha256: str  # of the weight files

    def spec(self, prompt: PromptSpec, precision: DType | None = None) -> TextEncoderSpec:
        """Return how a model's prompts are encoded, by default in float32.

        Raises:
            UnsupportedModelError: If the embeddings aren't the model's, or the precision is float16.
        """
        if prompt.width != self.config.d_model:
            raise UnsupportedModelError(
                f"{self.where}: this encoder's embeddings are {self.config.d_model} wide, the model takes "
                f"{prompt.width}. Give the model's own by --text-encoder PATH, or build with --no-text-encoder."
            )
        if precision is DType.FLOAT16:
            raise UnsupportedModelError(f"{self.where}: T5 overflows in float16. Give --text-precision fp32 or bf16.")
        return TextEncoderSpec(
            precision=precision or DType.FLOAT32,
            vocabulary=self.config.vocab_size,
            padding=self.tokenizer.padding,
            sha256=self.sha256,
        )

    def null_prompt(self, prompt: PromptSpec) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return what becomes of an empty text, in float32: embeddings (T, E) and mask (T,)."""
        words = PromptTokenizer(self.tokenizer.content, self.spec(prompt), prompt, where=self.tokenizer.where)
        tokens, mask = words.tokens("")
        module = TextEncoderPart(self.encoder, tokens=prompt.tokens).eval()
        with torch.no_grad(), _computing_in_float32(module):
            (embeddings,) = module(torch.from_numpy(tokens[None]), torch.from_numpy(mask[None]))
        return embeddings[0].numpy(), mask

    def part(self, prompt: PromptSpec) -> Part:
        """Return the encoder as a part."""
        module = TextEncoderPart(self.encoder, tokens=prompt.tokens).eval().requires_grad_(False)
        return Part(spec=text_encoder_spec(prompt), module=module, structure=TEXT_ENCODER_PART)


@contextmanager
def _computing_in_float32(module: TextEncoderPart) -> Iterator[None]:
    """Let a module of any precision compute in float32, with one layer's weights in it at a time."""
    stored: dict[nn.Module, list[Tensor]] = {}

    def widen(layer: nn.Module, inputs: object) -> None:
        stored[layer] = [weight.data for weight in layer.parameters()]
        for weight in layer.parameters():
            weight.data = weight.data.float()

    def restore(layer: nn.Module, inputs: object, output: object) -> None:
        for weight, data in zip(layer.parameters(), stored.pop(layer), strict=True):
            weight.data = data

    layers = [each for each in module.modules() if any(True for _ in each.parameters(recurse=False))]
    layers += [block.layer[-1] for block in module.blocks]  # whose own code asks for the type of a layer to come
    hooks = [each.register_forward_pre_hook(widen) for each in layers]
    hooks += [each.register_forward_hook(restore) for each in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def load_text_encoder(folder: Path) -> LoadedTextEncoder:
    """Load a local T5 encoder in transformers' layout. Nothing is fetched, and no code in it is run.

    Args:
        folder: Holds config.json and the weights: the `text_encoder` of a pipeline's folder. The pipeline's own folder
            will do too. Its tokenizer stands in the folder `tokenizer` beside it, or in it.

    Raises:
        CheckpointError: If weights are missing, truncated, unsafe, or don't fit the configuration, or the tokenizer
            is missing or damaged.
        UnsupportedModelError: If it is no T5, or one with a feature that has no compiled form.
    """
    folder = folder_in_pipeline(folder, "text_encoder") or folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json. Give a T5 encoder's folder in transformers' layout.")
    config = T5Config.checked(json_object(folder / "config.json", CheckpointError), where=str(folder / "config.json"))
    beside = folder.resolve().parent / "tokenizer"
    words = load_tokenizer(beside if beside.is_dir() else folder)
    if words.size > config.vocab_size:
        raise CheckpointError(
            f"{words.where} knows {words.size} tokens, the encoder in {folder} {config.vocab_size}. "
            "Check that they belong together."
        )
    files = weight_files(folder, names=_WEIGHTS_NAMES)
    state = _encoder_weights(state_dict_from_files(files, as_stored=True))
    encoder = _empty_encoder(config)
    require_tensors(state, _encoder_weights(encoder.state_dict()), where=str(folder), model="T5EncoderModel")
    encoder.load_state_dict({**state, _TIED: state[_SHARED]}, assign=True)
    return LoadedTextEncoder(
        where=str(folder),
        encoder=encoder.eval().requires_grad_(False),
        config=config,
        tokenizer=words,
        sha256=checkpoint_sha256(files),
    )


def _encoder_weights(state: StateDict) -> StateDict:
    """Return the encoder's weights, the table of tokens once, without a decoder's."""
    weights = {name: value for name, value in state.items() if name.startswith("encoder.") and name != _TIED}
    for name in (_SHARED, _TIED):
        if name in state:
            return {_SHARED: state[name], **weights}
    return weights


def _empty_encoder(config: T5Config) -> T5EncoderModel:
    """Return the model with its weights on the meta device."""
    import transformers

    with torch.device("meta"):
        settings = config.model_dump(exclude={"model_type"})
        return transformers.T5EncoderModel(transformers.T5Config(**settings, use_cache=False))
