"""Each prompt is encoded once, alone, and what an engine leaves is checked; a cancelled request stops between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError, RequestError, SamplingCancelledError
from adacorr_deploy.core.prompts import text_encoder_spec
from adacorr_deploy.core.specs import PartSpec, PromptSpec
from adacorr_deploy.engines.backend import Buffer
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.runtime.prompt_encoder import PromptEncoder
from tests.core.test_tokenizer import PROMPT, tokenizer


class FakeSession:
    """Writes each token's number into its embedding, so that a test can read what it was given."""

    launches = 0

    def __init__(self, prompt: PromptSpec = PROMPT, *, broken: bool = False) -> None:
        self.spec: PartSpec = text_encoder_spec(prompt)
        self._value = np.nan if broken else 1.0

    def bind(self, buffers: Mapping[str, Buffer]) -> FakeSession:
        self._buffers = buffers
        return self

    def run(self) -> None:
        self.launches += 1
        tokens, mask = (np.asarray(self._buffers[name].read(), np.int64) for name in ("prompt_tokens", "prompt_mask"))
        values: NDArray[np.float64] = (tokens * mask)[..., None] * np.full(PROMPT.width, self._value)
        self._buffers["prompt_embeddings"].write(values.astype(np.float32))

    def close(self) -> None: ...


def encoder(session: FakeSession) -> PromptEncoder:
    return PromptEncoder(tokenizer(), session, OnnxRuntimeBackend(threads=1))


def test_prompts_become_rows_in_their_order_each_launched_once() -> None:
    session = FakeSession()
    made = encoder(session)
    found = made.encode(["a", "", "AB", "a"])
    assert found.embeddings.shape == (4, PROMPT.tokens, PROMPT.width)
    assert found.embeddings[:, :, 0].tolist() == [
        [3, 4, 1, 0, 0, 0],
        [1] + [0] * 5,
        [6, 1, 0, 0, 0, 0],
        [3, 4, 1, 0, 0, 0],
    ]
    assert found.mask.sum(axis=1).tolist() == [3, 1, 2, 3]
    assert session.launches == 3
    again = made.encode(["ab"])  # as it is encoded it is lower case, but what was asked for is another text
    np.testing.assert_array_equal(again.embeddings[0], found.embeddings[2])
    found.embeddings[:] = 7  # the caller's own: what is kept does not change
    assert made.encode(["a"]).embeddings[0, 0, 0] == 3


def test_embeddings_that_are_not_finite_are_no_result() -> None:
    with pytest.raises(EngineError, match=r"embeddings of the prompt hold NaN .* --text-precision fp32"):
        encoder(FakeSession(broken=True)).encode(["a"])


def test_cancelling_stops_before_the_next_prompt() -> None:
    session = FakeSession()
    answers: Sequence[bool] = [False, True]
    asked = iter(answers)
    with pytest.raises(SamplingCancelledError, match="prompt 2 of 3"):
        encoder(session).encode(["a", "b", "ab"], cancelled=lambda: next(asked))
    assert session.launches == 1


def test_a_prompt_that_is_no_text_is_refused_by_its_name() -> None:
    with pytest.raises(RequestError, match="negative prompt is 7, allowed is text"):
        encoder(FakeSession()).encode(["a"], [7])  # type: ignore[list-item]
    with pytest.raises(RequestError, match=r"There is no prompt\. Give one for each image"):
        encoder(FakeSession()).encode([])


def test_a_negative_prompt_is_encoded_as_any_other() -> None:
    made = encoder(FakeSession())
    found = made.encode(["a", "ab"], [""])
    assert found.negative is not None
    np.testing.assert_array_equal(found.negative.embeddings, made.encode([""]).embeddings)
    assert found.negative.negative is None
