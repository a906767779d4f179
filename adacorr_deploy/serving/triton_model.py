"""The model that Triton's Python backend loads: from its requests to the service, and from its answers to responses.

It is not decoupled, so that plain calls work (infer over gRPC and HTTP, generate): each request's response sender is
kept, and answers whenever the engine is done, in any order. Streams are read by a light decoupled model beside it
(`templates/stream_model.py`), which asks this one; so the engines are in memory once.
"""

from __future__ import annotations

import json
import os
import secrets
import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.core.errors import AdaCorrError, EngineError
from adacorr_deploy.engines.backend import Backend
from adacorr_deploy.runtime import Pipeline, SampleRequest, sample_with_policy
from adacorr_deploy.runtime.batching import BatchingEngine
from adacorr_deploy.runtime.example_requests import example_request
from adacorr_deploy.runtime.measurements import calibrations
from adacorr_deploy.runtime.self_test import self_test
from adacorr_deploy.serving.engine import Engine
from adacorr_deploy.serving.logs import JsonLog, Level
from adacorr_deploy.serving.metrics import METRICS, Metric, MetricKind, Recorder
from adacorr_deploy.serving.orders import OrderBook
from adacorr_deploy.serving.prompt_desk import PromptDesk
from adacorr_deploy.serving.replies import Incoming, Status
from adacorr_deploy.serving.reports import Reports
from adacorr_deploy.serving.service import SamplingService
from adacorr_deploy.serving.settings import (
    BUNDLE_NAME,
    CPU_BACKEND,
    SETTINGS_NAME,
    ServingSettings,
    settings_from_file,
)
from adacorr_deploy.serving.telemetry import traceparent_from, tracing_from_environment
from adacorr_deploy.serving.tensors import Tensors

if TYPE_CHECKING:
    import triton_python_backend_utils as pb_utils

else:
    try:
        import triton_python_backend_utils as pb_utils  # inside the server only
    except ModuleNotFoundError:
        pb_utils = None

_WARM_UP_STEPS: Final = 2
_MAX_ID: Final = 128  # characters that the log shows of a client's own id
_NOT_IDENTICAL: Final = (
    "On this machine a row's result depends on how many others its launch has: what else is sampled at the time shows "
    "in an image's last bits."
)


class TritonPythonModel:
    """One instance: one process, one pipeline, one engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, try its engines, and start to serve.

        Raises:
            TritonModelException: If the engines don't fit this machine, or anything in the repository is not valid. It
                stops the load, and its text says what to do.
        """
        folder = Path(args["model_repository"]) / args["model_version"]
        with ExitStack() as resources:
            log = JsonLog(args["model_name"])
            try:
                settings = settings_from_file(folder / SETTINGS_NAME)
                backend = _parameter(args["model_config"], "backend")
                pipeline = resources.enter_context(
                    _opened(folder / BUNDLE_NAME, backend, settings.limits.lanes_on(backend))
                )
                book = OrderBook.of_repository(pipeline.manifest, settings, folder)
                warm_up(pipeline, settings)
                decoder = pipeline.decoder().images if pipeline.manifest.decoder is not None else None
                engine = engine_of(pipeline, settings, log)
                prompts = prompt_desk_of(pipeline, engine, settings)
            except AdaCorrError as error:
                log.write(Level.ERROR, "load", {"message": str(error)})
                _stop_load(str(error))
            tracing, obstacle = tracing_from_environment(args["model_name"])
            if obstacle:
                log.write(Level.WARNING, "tracing", {"message": obstacle})
            if tracing is not None:
                resources.callback(tracing.close)  # once the last request is answered
            service = SamplingService(
                engine,
                book,
                Reports(recorder=Recorder(TritonMetrics()), log=log, tracing=tracing),
                images=decoder,
                prompts=prompts,
                calibrations=[*calibrations(pipeline.bundle).values()],
            )
            self._service = resources.enter_context(service)
            self._log = log
            self._resources = resources.pop_all()
        values = {"backend": pipeline.backend.name, "hardware": pipeline.backend.hardware}
        log.write(Level.INFO, "ready", {"bundle": pipeline.manifest.model_name, **values})

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        """Take requests in; each is answered later, through its own sender."""
        for request in requests:
            reply = TritonReply(request.get_response_sender())
            try:
                incoming = _incoming(request)
            except Exception as error:  # noqa: BLE001  raised from here, it would end all these requests, taken in or not
                self._log.write(Level.ERROR, "bug", {"message": traceback.format_exc()})
                reply.fail(Status.INTERNAL, f"The request can't be read: {type(error).__name__}.")
            else:
                self._service.handle(incoming, reply)

    def finalize(self) -> None:
        """Drain and free everything; Triton calls it when no request is left, or its patience is at an end."""
        self._resources.close()
        self._log.write(Level.INFO, "stopped", {})


def _opened(path: Path, backend: str | None, lanes: int) -> Pipeline:
    """Open the bundle, on a CPU with an equal share of its cores for each lane.

    Raises:
        AdaCorrError: With the command that rebuilds, if the engines can't be opened here.
    """
    try:
        return Pipeline.open(path, backend=backend_for_lanes(backend, lanes))
    except EngineError as error:
        wanted = backend or "the bundle's own"
        raise EngineError(
            f"{error} The repository asks for engines of backend {wanted}. Rebuild them for this machine with: "
            "adacorr-build MODEL -o NEW.bundle --backend NAME; then: adacorr-serve NEW.bundle -o REPOSITORY --overwrite"
        ) from error


def backend_for_lanes(name: str | None, lanes: int) -> Backend | str | None:
    """Return the backend whose launches leave the other lanes their cores; its name alone where there is one lane."""
    if name != CPU_BACKEND or lanes == 1:
        return name
    from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend

    return OnnxRuntimeBackend(threads=max(1, len(os.sched_getaffinity(0)) // lanes))


def warm_up(pipeline: Pipeline, settings: ServingSettings) -> None:
    """Run every engine once, so that no client waits for what happens only then, and compare with the golden sample.

    Raises:
        AdaCorrError: If an engine fails, or computes something else than the PyTorch model did.
    """
    if any(name.startswith("golden/") for name in pipeline.manifest.files):
        self_test(pipeline)
    defaults = settings.defaults
    request = SampleRequest(
        (0,), steps=min(_WARM_UP_STEPS, defaults.steps), guidance=defaults.guidance, sampler=defaults.sampler
    )
    request = example_request(pipeline.manifest.model, request, (0,))
    if pipeline.manifest.text_encoder is not None:
        pipeline.encode([""])
    sample_with_policy(pipeline, request, PRESETS["none"])


def engine_of(pipeline: Pipeline, settings: ServingSettings, log: JsonLog) -> Engine:
    """Return the engine that samples for all clients."""
    limits = settings.limits
    engine = BatchingEngine(
        pipeline,
        buckets=limits.batch_rows,
        max_queue=limits.max_queue,
        lanes=limits.lanes_on(pipeline.backend.name),
    )
    if not engine.buckets.identical:
        log.write(Level.WARNING, "buckets", {"message": _NOT_IDENTICAL})
    return engine


def prompt_desk_of(pipeline: Pipeline, engine: Engine, settings: ServingSettings) -> PromptDesk | None:
    """Return where prompts are encoded; None of bundles without a text encoder.

    Raises:
        AdaCorrError: If it can't be opened here.
    """
    if pipeline.manifest.text_encoder is None:
        return None
    return PromptDesk(
        pipeline.prompt_encoder().encode,
        max_queue=settings.limits.max_queue,
        engine_depth=lambda: engine.stats().queue_depth,
    )


def _stop_load(message: str) -> NoReturn:
    raise pb_utils.TritonModelException(message)


def _parameter(model_config: str, name: str) -> str | None:
    """Return a parameter of config.pbtxt; None where it is missing or empty."""
    parameters: dict[str, dict[str, str]] = json.loads(model_config).get("parameters", {})
    return parameters.get(name, {}).get("string_value") or None


def _incoming(request: pb_utils.InferenceRequest) -> Incoming:
    def tensors() -> Tensors:
        return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}

    parameters: dict[str, str | int | float | bool] = json.loads(request.parameters() or "{}")
    return Incoming(
        request_id=request.request_id()[:_MAX_ID] or secrets.token_hex(8),
        tensors=tensors,
        parameters=parameters,
        wanted=frozenset(request.requested_output_names()),
        traceparent=traceparent_from(parameters.get("triton_trace") or request.trace().get_context(), parameters),
    )


class TritonReply:
    """A response sender of the Python backend."""

    def __init__(self, sender: pb_utils.InferenceResponseSender) -> None:
        self._sender = sender

    def send(self, tensors: Tensors) -> None:
        outputs = [pb_utils.Tensor(name, np.ascontiguousarray(tensor)) for name, tensor in tensors.items()]
        self._end(pb_utils.InferenceResponse(output_tensors=outputs))

    def fail(self, status: Status, message: str) -> None:
        codes = {
            Status.INVALID: pb_utils.TritonError.INVALID_ARG,
            Status.UNAVAILABLE: pb_utils.TritonError.UNAVAILABLE,
            Status.CANCELLED: pb_utils.TritonError.CANCELLED,
            Status.INTERNAL: pb_utils.TritonError.INTERNAL,
        }
        self._end(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, codes[status])))

    def is_cancelled(self) -> bool:
        cancelled: bool = self._sender.is_cancelled()
        return cancelled

    def _end(self, response: pb_utils.InferenceResponse) -> None:
        self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


@dataclass(slots=True)
class TritonMetrics:
    """Our metrics in Triton's own registry, so that its /metrics shows them."""

    _metrics: dict[tuple[str, str | None], pb_utils.Metric] = field(default_factory=dict)
    _families: list[pb_utils.MetricFamily] = field(default_factory=list)  # must outlive their metrics

    def __post_init__(self) -> None:
        kinds = {
            MetricKind.COUNTER: pb_utils.MetricFamily.COUNTER,
            MetricKind.GAUGE: pb_utils.MetricFamily.GAUGE,
            MetricKind.HISTOGRAM: pb_utils.MetricFamily.HISTOGRAM,
        }
        for metric in METRICS:
            family = pb_utils.MetricFamily(name=metric.name, description=metric.text, kind=kinds[metric.kind])
            self._families.append(family)
            for value in metric.values or (None,):
                labels = {metric.label: value} if metric.label else {}
                self._metrics[metric.name, value] = (
                    family.Metric(labels=labels, buckets=list(metric.buckets))
                    if metric.kind is MetricKind.HISTOGRAM
                    else family.Metric(labels=labels)
                )

    def increment(self, metric: Metric, value: float, label: str | None = None) -> None:
        self._metrics[metric.name, label].increment(value)

    def set(self, metric: Metric, value: float) -> None:
        self._metrics[metric.name, None].set(value)

    def observe(self, metric: Metric, value: float) -> None:
        self._metrics[metric.name, None].observe(value)
