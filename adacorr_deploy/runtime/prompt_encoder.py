"""From prompts to embeddings, one at a time: what a prompt becomes doesn't depend on those beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError, SamplingCancelledError
from adacorr_deploy.core.tokenizer import PromptTokenizer
from adacorr_deploy.engines.backend import Backend, Session

_KEPT: Final = 16  # prompts whose embeddings stay in memory: the empty one, of guidance, comes with most requests


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEmbeddings:
    """What a text encoder makes of prompts."""

    embeddings: NDArray[np.float32]  # (P, T, E)
    mask: NDArray[np.int64]  # (P, T), 1 where a token is real


class PromptEncoder:
    """The `text_encoder` part of a bundle and its tokenizer, over buffers bound once."""

    def __init__(self, tokenizer: PromptTokenizer, session: Session, backend: Backend) -> None:
        self._tokenizer = tokenizer
        inputs, (embeddings,) = session.spec.inputs, session.spec.outputs
        self._inputs = [backend.allocate(tensor.resolved({}), tensor.dtype) for tensor in inputs]
        self._embeddings = backend.allocate(embeddings.resolved({}), embeddings.dtype)
        buffers = {tensor.name: buffer for tensor, buffer in zip(inputs, self._inputs, strict=True)}
        self._launch = session.bind({**buffers, embeddings.name: self._embeddings})
        self._encoded = lru_cache(maxsize=_KEPT)(self._encode)

    def encode(
        self, prompts: Sequence[str], *, field: str = "prompt", cancelled: Callable[[], bool] | None = None
    ) -> PromptEmbeddings:
        """Return the embeddings of prompts.

        Args:
            prompts: P of them, at least one; each is cut off after T tokens.
            field: What messages call them.
            cancelled: Asked before each; True ends the encoding.

        Raises:
            RequestError: If one is no text that can be encoded.
            EngineError: If the engine fails, or an embedding is not finite.
            SamplingCancelledError: If `cancelled` returned True.
        """
        encoded = []
        for done, prompt in enumerate(prompts):
            if cancelled is not None and cancelled():
                raise SamplingCancelledError(f"Cancelled at prompt {done + 1} of {len(prompts)}; nothing was kept.")
            encoded.append(self._encoded(prompt, field))
        embeddings, masks = zip(*encoded, strict=True)
        return PromptEmbeddings(embeddings=np.stack(embeddings), mask=np.stack(masks))

    def _encode(self, prompt: str, field: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return one prompt's embeddings (T, E) and mask (T,)."""
        tokens, mask = self._tokenizer.tokens(prompt, field=field)
        for buffer, values in zip(self._inputs, (tokens, mask), strict=True):
            buffer.write(values[None])
        self._launch.run()
        embeddings = np.asarray(self._embeddings.read()[0], dtype=np.float32)
        if not np.isfinite(embeddings).all():
            raise EngineError(
                f"The embeddings of the {field} hold NaN or infinite values. Rebuild the bundle with "
                "--text-precision fp32."
            )
        return embeddings, mask
