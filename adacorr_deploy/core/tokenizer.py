"""From a prompt to tokens, by a tokenizer.json that nobody vouches for and the `tokenizers` package."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import BackendUnavailableError, BundleError
from adacorr_deploy.core.prompts import MAX_VOCABULARY, TextEncoderSpec, checked_prompt
from adacorr_deploy.core.specs import PromptSpec
from adacorr_deploy.core.untrusted import clipped, value_from_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What T5's tokenizers are made of. Others could take any time: some run the file's own regular expressions.
_ALLOWED: Final[Mapping[str, frozenset[str]]] = {
    "normalizer": frozenset({"Sequence", "Precompiled", "Replace", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Strip"}),
    "pre_tokenizer": frozenset({"Sequence", "WhitespaceSplit", "Metaspace"}),
    "post_processor": frozenset({"TemplateProcessing"}),
    "model": frozenset({"Unigram"}),
}
_KNOWN_PATTERNS: Final = (" {2,}",)  # the regular expressions that transformers writes into them
_MAX_STEPS: Final = 16  # of a normaliser
_MAX_REPLACEMENT_BYTES: Final = 64  # of a character by a charsmap; T5's longest has 33
_MAX_SPECIAL: Final = 8  # tokens that are added to every prompt


class PromptTokenizer:
    """A bundle's tokenizer: prompts of any length become T tokens and a mask."""

    def __init__(self, content: bytes, spec: TextEncoderSpec, prompt: PromptSpec, *, where: str) -> None:
        """Read the tokenizer.

        Args:
            content: Of a tokenizer.json.
            spec: What encodes the tokens.
            prompt: T, above all.
            where: The file, for messages.

        Raises:
            BackendUnavailableError: If the package tokenizers is not installed.
            BundleError: If the content is no tokenizer of this encoder.
        """
        self._tokenizer = tokenizer_from_json(content, where=where)
        self._tokenizer.no_padding()
        with _no_tokenizer(where):
            self._tokenizer.enable_truncation(max_length=prompt.tokens)
        self._spec, self._length, self._where = spec, prompt.tokens, where
        self.tokens("")  # which any tokenizer of this length can

    def tokens(self, text: str, *, field: str = "prompt") -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return a prompt's tokens and its mask, (T,) each: cut off at T, or padded, where the mask is 0.

        Raises:
            RequestError: If it is no text that can be encoded; `field` names it.
            BundleError: If the tokenizer makes what the encoder doesn't take.
        """
        prompt = checked_prompt(text, field=field)
        with _no_tokenizer(self._where):
            found: list[int] = self._tokenizer.encode(prompt).ids
        if len(found) > self._length or max(found, default=0) >= self._spec.vocabulary:
            raise BundleError(
                f"{self._where} makes {len(found)} tokens up to {max(found, default=0)}, the encoder takes "
                f"{self._length} below {self._spec.vocabulary}. Rebuild the bundle with adacorr-build."
            )
        tokens = np.full(self._length, self._spec.padding, dtype=np.int64)
        tokens[: len(found)] = found
        return tokens, (np.arange(self._length) < len(found)).astype(np.int64)


def tokenizer_from_json(content: bytes, *, where: str) -> Tokenizer:
    """Return the tokenizer of a file, after checking what it is made of.

    Raises:
        BackendUnavailableError: If the package tokenizers is not installed.
        BundleError: If it is no T5 tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "A prompt needs the package tokenizers, which is not installed. Install it with: "
            "pip install 'adacorr-deploy[text]', or give embeddings in place of prompts."
        ) from error
    with _no_tokenizer(where):
        text = content.decode("utf-8")
        if fault := next(_faults(value_from_json(text)), None):
            raise ValueError(fault)
        return Tokenizer.from_str(text)


@contextmanager
def _no_tokenizer(where: str) -> Iterator[None]:
    """Turn what the library raises at a file into an error that a user can act on."""
    try:
        yield
    except BaseException as error:  # a panic of the library's is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BundleError(
            f"{where} is no T5 tokenizer ({clipped(str(error), 200)[1:-1]}). Rebuild the bundle with adacorr-build."
        ) from error


def _faults(raw: object) -> Iterator[str]:
    """Yield what a T5 tokenizer has not."""
    if not isinstance(raw, Mapping):
        yield "it holds no JSON object"
        return
    for key, allowed in _ALLOWED.items():
        for kind in _values_of("type", raw.get(key)):
            if kind not in allowed:
                yield f"{key} has a {clipped(kind)}, allowed are {', '.join(sorted(allowed))}"
    yield from _faults_of_normalizer(raw.get("normalizer"))
    model = raw.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, list) or not 1 <= len(vocabulary) <= MAX_VOCABULARY:
        yield f"model.vocab is {clipped(vocabulary)}, allowed is a list of 1 … {MAX_VOCABULARY} tokens"
    processor = raw.get("post_processor")
    if isinstance(processor, Mapping) and len(list(_values_of("id", processor.get("single")))) > _MAX_SPECIAL:
        yield f"post_processor adds more than {_MAX_SPECIAL} tokens"


def _faults_of_normalizer(raw: object) -> Iterator[str]:
    """Yield what would take long, or make a prompt longer: repeated a few times, that fills any memory."""
    for pattern in _values_of("Regex", raw):
        if pattern not in _KNOWN_PATTERNS:
            yield f"normalizer has the regular expression {clipped(pattern)}, allowed is {_KNOWN_PATTERNS[0]!r}"
    steps = list(_steps(raw))
    if any("type" not in step for step in steps):  # the library would guess, and so apply what was not checked
        yield "normalizer has a step without a type"
    maps = [step for step in steps if step.get("type") == "Precompiled"]
    if len(steps) > _MAX_STEPS or len(maps) > 1:
        yield f"normalizer has {len(steps)} steps and {len(maps)} charsmaps, allowed are {_MAX_STEPS} and 1"
    for step in steps:
        if step.get("type") == "Replace" and _grows(step.get("pattern"), step.get("content")):
            yield f"normalizer replaces {clipped(step.get('pattern'))} by a longer {clipped(step.get('content'))}"
    for step in maps:
        longest = _longest_replacement(str(step.get("precompiled_charsmap")))
        if longest > _MAX_REPLACEMENT_BYTES:
            yield (
                f"normalizer has a charsmap that replaces a character by {longest} bytes, allowed are "
                f"{_MAX_REPLACEMENT_BYTES}"
            )


def _steps(raw: object) -> Iterator[Mapping[str, object]]:
    """Yield a normaliser, or each of a sequence's, sequences included."""
    if isinstance(raw, Mapping):
        yield raw
        inner = raw.get("normalizers")
        for step in inner if isinstance(inner, list) else ():
            yield from _steps(step)


def _grows(pattern: object, content: object) -> bool:
    kinds = pattern if isinstance(pattern, Mapping) else {}
    shortest = 2 if "Regex" in kinds else len(str(kinds.get("String", "")))  # _KNOWN_PATTERNS matches two at least
    return len(str(content)) > shortest


def _longest_replacement(charsmap: str) -> int:
    """Return bytes: a charsmap is the length of its trie, the trie, and the replacements, each ended by a zero."""
    content = base64.b64decode(charsmap)
    start = 4 + int.from_bytes(content[:4], "little")
    return max(map(len, content[start:].split(b"\0")))


def _values_of(key: str, raw: object) -> Iterator[object]:
    """Yield what stands under a key, at any depth; lists of a vocabulary's size hold no settings."""
    if isinstance(raw, Mapping):
        if key in raw:
            yield raw[key]
        for name, value in raw.items():
            if name != "vocab":
                yield from _values_of(key, value)
    elif isinstance(raw, list):
        for value in raw:
            yield from _values_of(key, value)
