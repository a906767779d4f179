"""From prompts to embeddings, one at a time: what a prompt becomes doesn't depend on those beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError, RequestError, SamplingCancelledError
from adacorr_deploy.core.tokenizer import PromptTokenizer
from adacorr_deploy.engines.backend import Backend, Session
from adacorr_deploy.runtime.conditions import Prompts

_KEPT: Final = 16  # prompts whose embeddings stay in memory: the empty one, of guidance, comes with most requests


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
        self, prompts: Sequence[str], negative: Sequence[str] = (), *, cancelled: Callable[[], bool] | None = None
    ) -> Prompts:
        """Return the embeddings of prompts.

        Args:
            prompts: One per image, at least one; each is cut off after T tokens.
            negative: One for all images or one for each, of the rows without condition; none: the bundle's null prompt.
            cancelled: Asked before each; True ends the encoding.

        Raises:
            RequestError: If there are none, or one is no text that can be encoded.
            EngineError: If the engine fails, or an embedding is not finite.
            SamplingCancelledError: If `cancelled` returned True.
        """
        if not prompts:
            raise RequestError("There is no prompt. Give one for each image.")
        encoded = self._of_texts(prompts, "prompt", cancelled)
        return replace(encoded, negative=self._of_texts(negative, "negative prompt", cancelled) if negative else None)

    def _of_texts(self, texts: Sequence[str], field: str, cancelled: Callable[[], bool] | None) -> Prompts:
        encoded = []
        for done, text in enumerate(texts):
            if cancelled is not None and cancelled():
                raise SamplingCancelledError(f"Cancelled at {field} {done + 1} of {len(texts)}; nothing was kept.")
            encoded.append(self._encoded(text, field))
        embeddings, masks = zip(*encoded, strict=True)
        return Prompts(embeddings=np.stack(embeddings), mask=np.stack(masks))

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
