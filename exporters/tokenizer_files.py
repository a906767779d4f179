"""A T5 tokenizer, in whichever form a pipeline keeps it, as the one file that the runtime reads: tokenizer.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adacorr_deploy.core.errors import BundleError, CheckpointError
from adacorr_deploy.core.prompts import MAX_TOKENIZER_BYTES
from adacorr_deploy.core.tokenizer import tokenizer_from_json

_FILES: Final = ("tokenizer.json", "spiece.model")  # of which a folder holds one at least


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerJson:
    """A tokenizer as its file's content."""

    where: str  # the folder that it came from, for messages
    content: bytes  # of a tokenizer.json
    size: int  # tokens that it knows
    padding: int  # the token that fills a prompt up


def load_tokenizer(folder: Path) -> TokenizerJson:
    """Load a local T5 tokenizer in transformers' layout: tokenizer.json, or sentencepiece's spiece.model.

    Raises:
        CheckpointError: If there is none, or it is damaged or of another kind.
    """
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder} holds neither {' nor '.join(_FILES)}. Copy the tokenizer into the text encoder's folder, or "
            "into one called tokenizer beside it."
        )
    if any(file.stat().st_size > MAX_TOKENIZER_BYTES for file in found):
        raise CheckpointError(f"{found[0]}: a tokenizer of more than {MAX_TOKENIZER_BYTES} bytes. Copy it again.")
    from transformers import T5Tokenizer

    try:
        with _quiet_transformers():
            tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
            content: str = tokenizer.backend_tokenizer.to_str()
        padding: object = tokenizer.pad_token_id
        if not isinstance(padding, int):
            raise ValueError("it has no padding token")
        model = json.loads(content)["model"]
        if model["vocab"][model["unk_id"]][0] != tokenizer.unk_token:  # the library fills an empty vocabulary up
            raise ValueError("its vocabulary has no unknown token")
        size = tokenizer_from_json(content.encode(), where=str(folder)).get_vocab_size()
    except BundleError as error:  # it is not in a bundle yet
        raise CheckpointError(f"{error}") from error
    except Exception as error:  # files that nobody vouches for can make the readers raise anything
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} holds no T5 tokenizer that can be read ({reason}). Copy it again.") from error
    return TokenizerJson(where=str(folder), content=content.encode(), size=size, padding=padding)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the library's remarks on what it would have tried next."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
