"""Prompts become tokens and masks of one length, and a tokenizer.json that nobody vouches for can't do more."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adacorr_deploy.core.errors import BackendUnavailableError, BundleError, RequestError
from adacorr_deploy.core.prompts import MAX_PROMPT, TextEncoderSpec, checked_prompt
from adacorr_deploy.core.specs import DType, PromptSpec
from adacorr_deploy.core.tokenizer import PromptTokenizer

PIECES = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab"]
PROMPT = PromptSpec(tokens=6, width=8)
SPEC = TextEncoderSpec(precision=DType.FLOAT32, vocabulary=len(PIECES), padding=0, sha256="0" * 64)
_END = {"SpecialToken": {"id": "</s>", "type_id": 0}}


def document() -> dict[str, object]:
    """A tokenizer.json of a few pieces, of what T5's is made of."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, _END],
            "pair": [],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [[piece, -1.0] for piece in PIECES]},
    }


def tokenizer(content: object = None, spec: TextEncoderSpec = SPEC) -> PromptTokenizer:
    raw = document() if content is None else content
    return PromptTokenizer(json.dumps(raw).encode(), spec, PROMPT, where="tokenizer.json")


def test_a_prompt_is_padded_with_a_mask_and_cut_off_with_its_end() -> None:
    made = tokenizer()
    for text, tokens, mask in (
        ("AB a ", [6, 3, 4, 1, 0, 0], [1, 1, 1, 1, 0, 0]),
        ("", [1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]),
        ("ab ab ab ab ab ab ab ab", [6, 6, 6, 6, 6, 1], [1] * 6),
        ("日", [3, 2, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
    ):
        found, real = made.tokens(text)
        assert (found.tolist(), real.tolist()) == (tokens, mask), text
        assert found.dtype == real.dtype == np.dtype(np.int64)


@given(st.text(max_size=60))
def test_any_text_becomes_tokens_of_the_vocabulary(text: str) -> None:
    found, mask = tokenizer().tokens(text)
    assert found.shape == mask.shape == (PROMPT.tokens,)
    assert 0 <= found.min() <= found.max() < len(PIECES)
    assert mask.sum() >= 1
    assert (np.diff(mask) <= 0).all()  # what is real comes first
    assert (found[mask == 0] == SPEC.padding).all()


def test_prompts_are_lower_case_without_space_around_them() -> None:
    assert checked_prompt("  A Photo\n") == "a photo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (7, "prompt is 7, allowed is text"),
        (None, "prompt is None, allowed is text"),
        ("x" * (MAX_PROMPT + 1), f"prompt has {MAX_PROMPT + 1} characters, allowed are {MAX_PROMPT}"),
        ("a\ud800", "no lone surrogates"),
    ],
)
def test_what_is_no_prompt_is_refused(text: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        checked_prompt(text)
    with pytest.raises(RequestError, match=r"^negative_prompt "):
        checked_prompt(text, field="negative_prompt")


def _set(*path: str, value: object) -> Callable[[dict[str, object]], None]:
    def change(raw: dict[str, object]) -> None:
        place = raw
        for step in path[:-1]:
            found = place[step]
            assert isinstance(found, dict)
            place = found
        place[path[-1]] = value

    return change


_PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
_TRIE = (4).to_bytes(4, "little") + b"\0" * 4
_LONG_CHARSMAP = {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode(_TRIE + b"x" * 65 + b"\0").decode(),
}
_DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
_SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", "type", value="BPE"), "model has a 'BPE', allowed are Unigram"),
        (_set("model", "vocab", value=[]), "model.vocab is .*, allowed is a list of"),
        (_set("model", "vocab", value={"a": 1}), "model.vocab is"),
        (_set("model", "unk_id", value=10**6), "no T5 tokenizer"),
        (_set("model", value=None), "model.vocab is None"),
        (_set("normalizer", "pattern", value={"Regex": "(a+)+$"}), "the regular expression '.*', allowed is ' .2,.'"),
        (_set("normalizer", value=_PRECOMPILED), "no T5 tokenizer"),
        (_set("normalizer", value={"type": "Sequence", "normalizers": [{"type": "BertNormalizer"}]}), "BertNormalizer"),
        (_set("normalizer", value={"type": "Sequence", "normalizers": [_DOUBLING] * 40}), "41 steps"),
        (_set("normalizer", value=_DOUBLING), "replaces {'String': 'a'} by a longer 'aa'"),
        (_set("normalizer", "content", value="   "), "replaces {'Regex': .*} by a longer '   '"),
        (_set("normalizer", value={"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 16}), "17 steps .* are 16"),
        (_set("normalizer", value={"normalizers": [_DOUBLING]}), "normalizer has a step without a type"),
        (_set("normalizer", value=_LONG_CHARSMAP), "replaces a character by 65 bytes, allowed are 64"),
        (
            _set("normalizer", value={"type": "Sequence", "normalizers": [_LONG_CHARSMAP] * 2}),
            "3 steps and 2 charsmaps, allowed are 16 and 1",
        ),
        (_set("pre_tokenizer", value=_SPLIT), "pre_tokenizer has a 'Split'"),
        (_set("post_processor", "single", value=[_END] * 1000), "post_processor adds more than 8 tokens"),
        (_set("post_processor", "special_tokens", value={}), "no T5 tokenizer"),
        (_set("added_tokens", value=7), "no T5 tokenizer"),
    ],
)
def test_a_file_that_could_do_more_is_refused(change: Callable[[dict[str, object]], None], message: str) -> None:
    raw = document()
    change(raw)
    with pytest.raises(BundleError, match=message):
        tokenizer(raw)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"model": {"vocab": NaN}}'])
def test_what_is_no_tokenizer_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"tokenizer.json is no T5 tokenizer .* Rebuild"):
        PromptTokenizer(content, SPEC, PROMPT, where="tokenizer.json")


def test_tokens_beyond_the_encoder_and_ends_beyond_the_length_are_refused() -> None:
    """An embedding's table has no further rows: on a GPU, reading one would be reading other memory."""
    small = TextEncoderSpec(precision=DType.FLOAT32, vocabulary=4, padding=0, sha256="0" * 64)
    with pytest.raises(BundleError, match=r"makes 3 tokens up to 4, the encoder takes 6 below 4"):
        tokenizer(spec=small).tokens("a")
    raw = document()
    _set("post_processor", "single", value=[{"Sequence": {"id": "A", "type_id": 0}}, *[_END] * 7])(raw)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        tokenizer(raw)
    with pytest.raises(ValueError, match="padding 9 is no token of a vocabulary of 4"):
        TextEncoderSpec(precision=DType.FLOAT32, vocabulary=4, padding=9, sha256="0" * 64)


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'adacorr-deploy\[text\]', or give embeddings"):
        tokenizer()
