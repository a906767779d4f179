"""Prompts: what a bundle's text encoder takes and gives, and the text that it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.specs import DType, PartSpec, PromptSpec, TensorSpec
from adacorr_deploy.core.untrusted import clipped

TEXT_ENCODER_PART: Final = "text_encoder"
TOKENIZER_FILE: Final = "tokenizer/tokenizer.json"  # in a bundle
MAX_TOKENIZER_BYTES: Final = 64 << 20
MAX_VOCABULARY: Final = 1 << 20  # an untrusted manifest or tokenizer can't ask for more
MAX_PROMPT: Final = 10_000  # characters: many times what any encoder keeps of it

_Token = Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderSpec:
    """How prompts become tokens, and what encodes them.

    Raises:
        ValueError: If the padding is no token of the vocabulary.
    """

    precision: DType  # of weights and activations inside
    vocabulary: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]  # tokens are 0 … vocabulary − 1
    padding: _Token  # the token that fills a prompt up
    sha256: str  # of the encoder's weight files

    def __post_init__(self) -> None:
        if not 0 <= self.padding < self.vocabulary <= MAX_VOCABULARY:
            raise ValueError(f"padding {self.padding} is no token of a vocabulary of {self.vocabulary}")


def text_encoder_spec(prompt: PromptSpec) -> PartSpec:
    """Return the spec of `text_encoder`: tokens and mask of one prompt in, its embeddings out.

    One prompt at a time, so that its embeddings don't depend on what is encoded beside it, nor on the batch that
    engines were compiled for.
    """
    i64, f32 = DType.INT64, DType.FLOAT32
    return PartSpec(
        name=TEXT_ENCODER_PART,
        inputs=(
            TensorSpec(name="prompt_tokens", dtype=i64, shape=(1, prompt.tokens)),
            TensorSpec(name="prompt_mask", dtype=i64, shape=(1, prompt.tokens)),
        ),
        outputs=(TensorSpec(name="prompt_embeddings", dtype=f32, shape=(1, prompt.tokens, prompt.width)),),
    )


def checked_prompt(text: object, *, field: str = "prompt") -> str:
    """Return a prompt as encoders are trained on it, as diffusers' pipelines do without `clean_caption`.

    Raises:
        RequestError: If it is no text, too long, or can't be written as UTF-8.
    """
    if not isinstance(text, str):
        raise RequestError(f"{field} is {clipped(text)}, allowed is text.")
    if len(text) > MAX_PROMPT:
        raise RequestError(f"{field} has {len(text)} characters, allowed are {MAX_PROMPT}.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RequestError(f"{field} is {clipped(text)}, allowed is text that UTF-8 can write (no lone surrogates).")
    return text.lower().strip()
