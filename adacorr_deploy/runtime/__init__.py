"""The denoise loop over a bundle's parts: requests, cache slots, traces. No torch, no diffusers, no onnx."""

from __future__ import annotations

from adacorr_deploy.runtime.batch_desk import EngineStats
from adacorr_deploy.runtime.batch_ticket import Ending, Outcome, Ticket
from adacorr_deploy.runtime.batching import BatchingEngine
from adacorr_deploy.runtime.buffers import MAX_HISTORY
from adacorr_deploy.runtime.conditions import Prompts
from adacorr_deploy.runtime.denoise import Progress
from adacorr_deploy.runtime.pipeline import Pipeline, SampleResult
from adacorr_deploy.runtime.request import MAX_SEED, SampleRequest, check_request
from adacorr_deploy.runtime.sampling import controller_for_request, sample_with_policy
from adacorr_deploy.runtime.trace import Branch, Trace, TraceRecord

__all__ = [  # noqa: RUF022 (grouped by what they are for)
    # Sampling
    "Pipeline",
    "Progress",
    "SampleRequest",
    "SampleResult",
    "check_request",
    "controller_for_request",
    "sample_with_policy",
    "Prompts",
    # Many requests at once
    "BatchingEngine",
    "Ending",
    "EngineStats",
    "Outcome",
    "Ticket",
    # Limits
    "MAX_HISTORY",
    "MAX_SEED",
    # Trace
    "Branch",
    "Trace",
    "TraceRecord",
]
