"""A small random T5 encoder and a tokenizer that is trained on the spot, as a pipeline's folder holds them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel

VOCABULARY = 64
_COLOURS = ("red", "green", "blue", "crème", "Weiß")
_THINGS = ("dog", "cat", "house", "tree", "bird", "café", "Straße")


@cache
def spiece_model() -> bytes:
    """Train sentencepiece's Unigram, with T5's special tokens and its Unicode normalisation."""
    lines = [f"a photo of a {colour} {thing} in the park" for colour in _COLOURS for thing in _THINGS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=VOCABULARY - 8,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(folder: Path) -> Path:
    """Save a tokenizer in the form of most pipelines: spiece.model and its settings."""
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(spiece_model())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def random_t5(*, seed: int = 0, width: int = 32, vocab_size: int = VOCABULARY, **config: object) -> T5EncoderModel:
    """Make an encoder whose every weight matters."""
    torch.manual_seed(seed)
    settings = {"d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu", **config}
    model = T5EncoderModel(T5Config(vocab_size=vocab_size, d_model=width, **settings))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)
        else:
            torch.nn.init.normal_(weight, std=1.0 if "bias" in name or "shared" in name else 0.3)
    return model.eval().requires_grad_(False)


def write_text_encoder(pipeline: Path, model: T5EncoderModel | None = None) -> Path:
    """Save an encoder and a tokenizer into a pipeline's folder, and return that of the encoder."""
    (model or random_t5()).save_pretrained(pipeline / "text_encoder")
    write_tokenizer(pipeline / "tokenizer")
    return pipeline / "text_encoder"
