"""A tokenizer in any form becomes one tokenizer.json that makes the tokens of the original's own library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import T5Tokenizer

from adacorr_deploy.core.errors import CheckpointError
from adacorr_deploy.core.tokenizer import tokenizer_from_json
from adacorr_deploy.exporters.tokenizer_files import load_tokenizer
from tests.exporters.random_text_encoder import spiece_model, write_tokenizer

TEXTS = (
    "a photo of a red dog",
    "  two  spaces\tand a tab ",
    "ﬁne ①½ e\u0301 weiß",
    "日本 😀 \u200b\u00a0x",
    "",
    "<b>&amp;",
)


def test_it_makes_the_tokens_of_sentencepiece(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    tokenizer = tokenizer_from_json(loaded.content, where="it")
    original = sentencepiece.SentencePieceProcessor(model_proto=spiece_model())
    for text in TEXTS:
        assert tokenizer.encode(text).ids == [*original.encode(text), original.eos_id()], text
    assert loaded.padding == original.pad_id()
    assert loaded.size == original.get_piece_size() + 4  # and the sentinels of its settings


def test_both_forms_give_the_same_tokens(tmp_path: Path) -> None:
    slow = write_tokenizer(tmp_path / "slow")
    T5Tokenizer.from_pretrained(slow, local_files_only=True).save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "spiece.model").exists()
    contents = [load_tokenizer(folder).content for folder in (slow, tmp_path / "fast")]
    first, second = (tokenizer_from_json(content, where="it") for content in contents)
    for text in (*TEXTS, "<extra_id_0> dog</s>"):
        assert first.encode(text).ids == second.encode(text).ids, text


def test_the_content_depends_on_the_files_alone(tmp_path: Path) -> None:
    first, second = (load_tokenizer(write_tokenizer(tmp_path / name)) for name in ("a", "b"))
    assert first.content == second.content


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("spiece.model", b"", "holds no T5 tokenizer that can be read"),
        ("spiece.model", b"\xff" * 100, "holds no T5 tokenizer that can be read"),
        ("tokenizer_config.json", b"{", "holds no T5 tokenizer that can be read"),
        ("tokenizer.json", b"[]", "holds no T5 tokenizer that can be read"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": []}}', "holds no T5 tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_refused(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_no_tokenizer_and_no_padding_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    config = folder / "tokenizer_config.json"
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "spiece.model").unlink()
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor spiece.model. Copy the tokenizer"):
        load_tokenizer(tmp_path / "bare")
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": None}))
    with pytest.raises(CheckpointError, match="it has no padding token"):
        load_tokenizer(folder)
