"""What a bench samples: its options, and the requests that they come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.core.errors import RequestError
from adacorr_deploy.core.samplers import Sampler, default_sampler
from adacorr_deploy.core.shapes import MAX_BATCH
from adacorr_deploy.core.specs import ModelSpec
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.request import check_integer

MAX_IMAGES: Final = 1_000_000
MAX_ROUNDS: Final = 1000
FEWEST_SAMPLES: Final = 16  # below which neighbours and covariances say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is sampled.

    Attributes:
        images: Images per policy that are compared one by one with the uncached ones; labels go round the classes.
        batch: Images per request.
        rounds: How often every policy is timed; the medians count.
        sampler: As in a request; None is the model's own.
        samples: Images per policy whose features are compared as a set; 0 for no such comparison.

    Raises:
        RequestError: If one of these is out of range.
    """

    images: int = 16
    batch: int = 8
    rounds: int = 3
    steps: int = 50
    guidance: float = 4.0
    seed: int = 0
    sampler: Sampler | None = None
    samples: int = 0

    def __post_init__(self) -> None:
        for name, most in (("images", MAX_IMAGES), ("batch", MAX_BATCH), ("rounds", MAX_ROUNDS)):
            check_integer(name, getattr(self, name), 1, most)
        check_integer("samples", self.samples, 0, MAX_IMAGES)
        if 0 < self.samples < FEWEST_SAMPLES:
            raise RequestError(
                f"samples is {self.samples}, allowed are 0 (no comparison of sets) and from {FEWEST_SAMPLES} up. "
                "Thousands are needed for a distance that tells policies apart."
            )


def sampler_of_runs(pipeline: Pipeline, options: BenchOptions) -> Sampler:
    """Return the sampler of a bench's requests."""
    return options.sampler or default_sampler(pipeline.manifest.schedule)


def requests(pipeline: Pipeline, options: BenchOptions, images: int | None = None) -> Iterator[SampleRequest]:
    """Yield the requests that make all images: seeds count up by request, labels go round the classes.

    Args:
        pipeline: Says how many classes there are.
        options: Of the bench.
        images: How many, in place of `options.images`.
    """
    wanted = options.images if images is None else images
    for index in range(request_count(options, wanted)):
        yield request_at(pipeline, options, index, wanted)


def request_count(options: BenchOptions, images: int) -> int:
    """Return how many requests make so many images."""
    return -(-images // options.batch)


def request_at(pipeline: Pipeline, options: BenchOptions, index: int, images: int) -> SampleRequest:
    """Return one of the requests that make so many images; its prompts may be megabytes."""
    model, first = pipeline.manifest.model, index * options.batch
    numbers = range(first, min(first + options.batch, images))
    request = SampleRequest(
        labels=labels_of_images(model, numbers),
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed + first,
        sampler=sampler_of_runs(pipeline, options),
    )
    return example_request(model, request, numbers, pipeline.example_prompts)


def labels_of_images(model: ModelSpec, images: Sequence[int]) -> tuple[int, ...]:
    """Return the class of each image by its number, round all classes; 0 where the model has none."""
    return tuple(image % max(model.num_classes, 1) for image in images)
