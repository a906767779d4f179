"""What is told of every request that has ended: in the metrics, in the log, and as spans where those are collected."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.serving.engine import Finished
from adacorr_deploy.serving.logs import JsonLog, Level
from adacorr_deploy.serving.metrics import (
    IMAGES,
    QUEUE_SECONDS,
    REQUEST_SECONDS,
    REQUESTS,
    RHO,
    STEP_SECONDS,
    Outcome,
    Recorder,
)
from adacorr_deploy.serving.orders import Order
from adacorr_deploy.serving.replies import Incoming, outcome_of
from adacorr_deploy.serving.results import JsonValue
from adacorr_deploy.serving.telemetry import EndedRequest, Timeline, Tracing, trace_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Where what happens to requests goes; used from any thread.

    Attributes:
        recorder: Takes what is counted and measured.
        log: Takes a line for each request.
        tracing: Takes each request as it ends; None where nobody collects spans.
    """

    recorder: Recorder
    log: JsonLog
    tracing: Tracing | None = None

    def stepped(self, timeline: Timeline, rho: float) -> None:
        """Tell of a request's step, after which `rho` of its block launches were skipped."""
        seconds = timeline.stepped(rho)
        if seconds is not None:
            self.recorder.observe(STEP_SECONDS, seconds)

    def ended(
        self,
        incoming: Incoming,
        order: Order,
        timeline: Timeline,
        finished: Finished,
        error: AdaCorrError | None = None,
    ) -> None:
        """Tell of a request that the engine took in; `error` says why it has no answer, where it has none."""
        self.recorder.observe(QUEUE_SECONDS, finished.queue_seconds)
        about: dict[str, JsonValue] = {
            "images": order.request.batch,
            "steps": order.request.steps,
            "policy": order.policy.name,
            "queue_seconds": round(finished.queue_seconds, 6),
            "seconds": round(finished.seconds, 6),
        }
        result = finished.result
        if error is not None:
            about["message"] = str(error)
        elif result is not None:
            about |= {"rho": result.rho, "launches": result.launches}
            self.recorder.count(IMAGES, order.request.batch)
            self.recorder.observe(REQUEST_SECONDS, finished.seconds)
            self.recorder.observe(RHO, result.rho)
        self._tell(
            EndedRequest(
                request_id=incoming.request_id,
                traceparent=incoming.traceparent,
                outcome=Outcome.DONE if error is None else outcome_of(error),
                attributes=about,
                timeline=timeline,
                queue_seconds=finished.queue_seconds,
                result=result,
            )
        )

    def refused(self, incoming: Incoming, error: AdaCorrError) -> None:
        """Tell of a request that came to no engine."""
        self._tell_untaken(incoming, outcome_of(error), str(error))

    def broke(self, incoming: Incoming) -> None:
        """Tell of a request that met a bug of ours, which is being handled."""
        self._tell_untaken(incoming, Outcome.FAILED, traceback.format_exc())

    def guarded(self, work: Callable[[], object]) -> None:
        """Do what concerns one client; nothing that goes wrong with it may end the thread that all need."""
        try:
            work()
        except Exception:  # noqa: BLE001  a bug of ours, or of the server's
            self.log.write(Level.ERROR, "bug", {"message": traceback.format_exc()})

    def _tell_untaken(self, incoming: Incoming, outcome: Outcome, message: str) -> None:
        self._tell(
            EndedRequest(
                request_id=incoming.request_id,
                traceparent=incoming.traceparent,
                outcome=outcome,
                attributes={"message": message},
            )
        )

    def _tell(self, request: EndedRequest) -> None:
        self.recorder.count(REQUESTS, label=request.outcome.value)
        level = {Outcome.DONE: Level.INFO, Outcome.FAILED: Level.ERROR}.get(request.outcome, Level.WARNING)
        about = {
            "request_id": request.request_id,
            "trace_id": trace_id(request.traceparent),
            "outcome": request.outcome.value,
        }
        self.log.write(level, "request", {**about, **request.attributes})
        tracing = self.tracing
        if tracing is not None:
            self.guarded(lambda: tracing.ended(request))
