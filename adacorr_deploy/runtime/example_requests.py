"""Requests that nobody made: what a model's engines are measured and tested with, where no prompt is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from adacorr_deploy.core.specs import ModelSpec, PromptSpec
from adacorr_deploy.plugins.oracle import philox_normals
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.runtime.request import SampleRequest

_PROMPT_SEED: Final = 0x70726F6D7074  # apart from the seeds that people use
_FRAME_RATE: Final = 24.0
_LEAST_SHARE: Final = 4  # a prompt fills at least a fourth of its tokens


def example_request(
    model: ModelSpec, request: SampleRequest, images: Sequence[int], prompts: Prompts | None = None
) -> SampleRequest:
    """Return a request for as many images as `images` has numbers, with all that the model needs to be told.

    Its labels stay, where the model takes some; images go round `prompts`. Without any, prompts are random embeddings,
    always the same for the same number: an engine computes on them as on any, but what a policy costs on them is not
    what it costs on real ones.
    """
    prompt, conditions = model.conditions.prompt, model.conditions
    return replace(
        request,
        labels=request.labels if conditions.num_classes else (),
        prompts=prompts.taken(images) if prompts is not None else _random_prompts(prompt, images),
        frame_rate=_FRAME_RATE if conditions.frame_rate else None,
    )


def _random_prompts(spec: PromptSpec | None, images: Sequence[int]) -> Prompts | None:
    return None if spec is None else example_prompts(spec, images)


def example_prompts(spec: PromptSpec, images: Sequence[int]) -> Prompts:
    """Return random prompts by number, of various lengths, and a negative one of a single token."""
    numbers = [1 + image for image in images]
    return replace(_drawn(spec, numbers), negative=_drawn(spec, [0]))


def _drawn(spec: PromptSpec, numbers: Sequence[int]) -> Prompts:
    draws = [philox_normals(_PROMPT_SEED, number, 0, spec.tokens * spec.width) for number in numbers]
    embeddings = np.stack(draws).reshape(-1, spec.tokens, spec.width)
    least = -(-spec.tokens // _LEAST_SHARE)
    real = [1 if number == 0 else least + number * 7 % (spec.tokens - least + 1) for number in numbers]
    mask = (np.arange(spec.tokens) < np.asarray(real)[:, None]).astype(np.int64)
    return Prompts(embeddings=embeddings * mask[..., None].astype(np.float32), mask=mask)
