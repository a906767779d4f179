"""Where tokens stand between block parts, so that a span's input outlives its evaluation and nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence

from adacorr_deploy.caching.decisions import Span, SpanCache, keeps_output, unit_spans
from adacorr_deploy.core.errors import PolicyError
from adacorr_deploy.core.untrusted import clipped

_BUFFERS = 3  # a span's input, and two that its inner parts take in turns


def token_places(spans: Sequence[Span]) -> tuple[int, ...]:
    """Return the number of the token buffer at each boundary between parts, from first input to last output.

    A part never writes into the buffer that it reads, and no part of a span into the buffer of the span's input: what a
    span adds can be taken as a difference afterwards, and its reuse writes where its evaluation would. Spans of one
    part take two buffers in turns; longer ones need a third.
    """
    places = [0]
    for span in spans:
        inner = [place for place in range(_BUFFERS) if place != places[-1]]
        places += [inner[index % 2] for index in range(len(span.parts))]
    return tuple(places)


def own_layout(spans: tuple[Span, ...], parts: int) -> tuple[Span, ...]:
    """Return the spans that a workspace must be laid out for: none where each part, or the whole step, is a span."""
    return () if keeps_output(spans) or spans == unit_spans(parts) else spans


def check_spans(spans: Sequence[Span], parts: int) -> None:
    """Refuse a division that can't be run.

    Raises:
        PolicyError: If the spans don't follow on each other through all parts, or one keeps what it can't.
    """
    firsts, stops = [span.first for span in spans], [span.stop for span in spans]
    fault = ""
    if [*firsts, parts] != [0, *stops] or not all(span.parts for span in spans):
        fault = "each must begin where the one before stops, and together they must hold every part once"
    elif any(span.cache is SpanCache.UNITS and len(span.parts) > 1 for span in spans):
        fault = "one that keeps units must be a single part"
    elif any(span.cache is SpanCache.OUTPUT for span in spans) and len(spans) > 1:
        fault = "one that keeps the model's output must be the whole step"
    if fault:
        raise PolicyError(f"The policy divides {parts} block parts into {clipped(tuple(spans))}; {fault}.")
