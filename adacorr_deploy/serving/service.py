"""Sampling as a service: checks requests, hands them to the engine, answers, and watches over those in between.

Four threads beside the server's own: the engine's, which samples and must not wait; one that encodes prompts and one
that answers, since text encoders and making PNG files take their time; and one that asks now and then whether clients
are still there.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Final

from adacorr_deploy.caching.calibration import Calibration
from adacorr_deploy.core.errors import AdaCorrError, CalibrationError, EngineError, RequestError
from adacorr_deploy.core.untrusted import clipped
from adacorr_deploy.runtime import Prompts, SampleRequest
from adacorr_deploy.runtime.images import pixels_from_latents
from adacorr_deploy.serving.engine import Engine, Finished, Ticket
from adacorr_deploy.serving.orders import Order, OrderBook
from adacorr_deploy.serving.prompt_desk import OnDone, PromptDesk
from adacorr_deploy.serving.replies import GuardedReply, Incoming, Reply, Status, for_a_client, status_of
from adacorr_deploy.serving.reports import Reports
from adacorr_deploy.serving.results import ImagesOfLatents, JsonValue, event_tensor, result_tensors
from adacorr_deploy.serving.streams import Stream
from adacorr_deploy.serving.telemetry import TRACEPARENT, Timeline
from adacorr_deploy.serving.tensors import IMAGE_NAMES, OUTPUTS, Field, Tensors, fields_from_tensors

COMMANDS: Final = ("sample", "submit", "next", "cancel", "status")

_WATCH_SECONDS: Final = 0.05  # between two questions to the server whether a client has gone
_FLUSH_SECONDS: Final = 0.5  # between two updates of the metrics
_SERVER_PARAMETERS: Final = frozenset(  # that servers pass on, or take for themselves
    {
        "id",
        "priority",
        "timeout",
        "sequence_id",
        "sequence_start",
        "sequence_end",
        "binary_data_output",
        TRACEPARENT,
    }
)


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A request between its arrival and its answer."""

    incoming: Incoming
    order: Order
    reply: Reply
    ticket: Ticket | None = None
    client_gone: bool = False
    timeline: Timeline = field(default_factory=Timeline)


class SamplingService:
    """Use it as a context manager: `close` answers what is still running, within the engine's own limits."""

    def __init__(
        self,
        engine: Engine,
        book: OrderBook,
        reports: Reports,
        *,
        images: ImagesOfLatents | None = None,
        prompts: PromptDesk | None = None,
        calibrations: Sequence[Calibration] = (),
    ) -> None:
        """Make a service; nothing runs before it is entered.

        Args:
            engine: Samples.
            book: Checks orders.
            reports: Take what happens.
            images: Decodes latents, and is called from one thread; None where latents are the images.
            prompts: Encodes the texts of orders; None where none has any. It is closed with the service.
            calibrations: The bundle's: a client who asks for a run that has none is told of those that have.
        """
        self._engine = engine
        self._images = images or pixels_from_latents
        self._prompts = prompts
        self._calibrations = tuple(calibrations)
        self._book = book
        self._reports = reports
        self._pending: dict[int, _Pending] = {}
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._to_answer: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._asked = threading.Event()  # once a request came: until then the server itself may not be ready for us
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._give_answers, "adacorr-answers"), (self._watch, "adacorr-watch"))
        ]

    def __enter__(self) -> SamplingService:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End: the engine finishes or gives up what it has, and everybody gets an answer."""
        if self._prompts is not None:
            self._prompts.close()
        self._engine.close()
        self._to_answer.put(None)
        self._closing.set()
        self._asked.set()
        for thread in self._threads:
            thread.join()

    # --- Requests ------------------------------------------------------------------------------------------------

    def handle(self, incoming: Incoming, reply: Reply) -> None:
        """Take a request in and return at once; the answer comes when it is there."""
        self._asked.set()
        reply = GuardedReply(reply)
        try:
            self._dispatch(incoming, reply)
        except AdaCorrError as error:
            self._refuse(incoming, reply, error)
        except Exception as error:  # noqa: BLE001  a bug of ours: the client must not wait for ever
            self._reports.broke(incoming)
            reply.fail(Status.INTERNAL, f"An error inside the server: {type(error).__name__}. Its log tells more.")

    def _dispatch(self, incoming: Incoming, reply: Reply) -> None:
        _check_parameters(incoming.parameters)
        fields = fields_from_tensors(incoming.tensors())
        match fields.pop("command", COMMANDS[0]):
            case "sample":
                _check_unused(fields, "stream", "after_step")
                self._submit(_Pending(incoming=incoming, order=self._order(incoming, fields), reply=reply))
            case "submit":
                _check_unused(fields, "stream", "after_step")
                reply.send(self._open_stream(incoming, self._order(incoming, fields)))
            case "next":
                after_step = fields.get("after_step", 0)
                stream = self._stream(fields)
                stream.ask(reply, after_step if isinstance(after_step, int) else 0)
                self._to_answer.put(stream.answer)
            case "cancel":
                self._close_stream(self._stream(fields))
                reply.send({"event": event_tensor("cancelled", {})})
            case "status":
                reply.send({"event": event_tensor("status", self.status())})
            case other:
                raise RequestError(f"command is {clipped(other)}, allowed are {', '.join(COMMANDS)}.")

    def status(self) -> dict[str, JsonValue]:
        """Return what a probe wants to know."""
        stats = self._engine.stats()
        return {
            "queue_depth": stats.queue_depth + self._waiting_prompts(),
            "active_requests": stats.active_requests,
            "slot_bytes": stats.slot_bytes,
            "streams": len(self._streams),
        }

    def _waiting_prompts(self) -> int:
        return len(self._prompts) if self._prompts is not None else 0

    def _order(self, incoming: Incoming, fields: Mapping[str, Field]) -> Order:
        named = incoming.wanted if len(incoming.wanted) < len(OUTPUTS) else frozenset[str]()
        return self._book.order(fields, wanted=[name for name in IMAGE_NAMES if name in named])

    def _submit(self, pending: _Pending, stream: Stream | None = None) -> None:
        order = pending.order
        deadline = None if order.timeout_seconds is None else time.monotonic() + order.timeout_seconds

        def stepped(step: int, steps: int, rho: float) -> None:
            self._reports.stepped(pending.timeline, rho)
            if stream is not None:
                stream.progressed(step, steps, rho)
                self._to_answer.put(stream.answer)

        def done(finished: Finished) -> None:
            self._to_answer.put(partial(self._answer, pending, finished))

        def to_engine(request: SampleRequest, on_done: OnDone) -> Ticket:
            return self._engine.submit(
                request,
                order.policy,
                deadline=deadline,
                on_step=stepped,
                on_done=on_done,
                preview_every=order.preview_every if stream is not None else 0,
                on_preview=stream.previewed if stream is not None else None,
            )

        def encoded(prompts: Prompts, on_done: OnDone) -> Ticket:
            return to_engine(replace(order.request, prompts=prompts), on_done)

        with self._lock:
            self._pending[id(pending)] = pending
        try:
            if order.texts is None:
                pending.ticket = to_engine(order.request, done)
            elif self._prompts is not None:
                pending.ticket = self._prompts.submit(order.texts, encoded, deadline=deadline, on_done=done)
            else:
                raise AssertionError("prompts were taken, and nothing is there to encode them")
        except CalibrationError as error:
            self._forget(pending)
            raise self._for_a_client(order, error) from error
        except BaseException:
            self._forget(pending)
            raise

    def _for_a_client(self, order: Order, error: AdaCorrError) -> AdaCorrError:
        """Return what the client is told: the text of a missing calibration has the operator's command, for the log."""
        if isinstance(error, CalibrationError):
            return CalibrationError(for_a_client(order.policy, order.request, self._calibrations))
        return error

    # --- Streams -------------------------------------------------------------------------------------------------

    def _open_stream(self, incoming: Incoming, order: Order) -> Tensors:
        stream = Stream(name=secrets.token_hex(8), outputs=order.outputs, images=self._images)
        pending = _Pending(incoming=incoming, order=order, reply=stream)
        self._submit(pending, stream)
        stream.ticket = pending.ticket
        with self._lock:
            self._streams[stream.name] = stream
        return {"event": event_tensor("submitted", {"stream": stream.name})}

    def _stream(self, fields: Mapping[str, Field]) -> Stream:
        name = fields.get("stream")
        stream = self._streams.get(name) if isinstance(name, str) else None
        if stream is None:
            raise RequestError(f"stream is {clipped(name)}, which is none that is open: it ended, or was not read.")
        return stream

    def _close_stream(self, stream: Stream) -> None:
        """Forget a stream, and end its request if it has not ended."""
        self._forget_stream(stream)
        if stream.ticket is not None:
            stream.ticket.cancel()

    def _forget_stream(self, stream: Stream) -> None:
        with self._lock:
            self._streams.pop(stream.name, None)

    # --- Answers -------------------------------------------------------------------------------------------------

    def _give_answers(self) -> None:
        while (answer := self._to_answer.get()) is not None:
            self._reports.guarded(answer)

    def _answer(self, pending: _Pending, finished: Finished) -> None:
        self._forget(pending)
        incoming, order = pending.incoming, pending.order
        try:
            tensors = self._tensors(order, finished)
        except AdaCorrError as error:
            self._reports.ended(incoming, order, pending.timeline, finished, error)
            pending.reply.fail(status_of(error), str(self._for_a_client(order, error)))
        else:
            self._reports.ended(incoming, order, pending.timeline, finished)
            pending.reply.send(tensors)

    def _tensors(self, order: Order, finished: Finished) -> Tensors:
        """Return the answer to a request.

        Raises:
            AdaCorrError: Why there is none.
        """
        if finished.result is None:
            raise finished.error or EngineError("The engine gave no result.")
        return result_tensors(
            finished.result,
            images=self._images,
            outputs=order.outputs,
            policy=order.policy.name,
            queue_seconds=finished.queue_seconds,
        )

    def _forget(self, pending: _Pending) -> None:
        with self._lock:
            self._pending.pop(id(pending), None)

    def _refuse(self, incoming: Incoming, reply: Reply, error: AdaCorrError) -> None:
        of_operator = error.__cause__ if isinstance(error.__cause__, AdaCorrError) else error
        self._reports.refused(incoming, of_operator)
        reply.fail(status_of(error), str(error))

    # --- Watching ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        flushed = 0.0
        self._asked.wait()  # Triton 24.10 never comes up if a metric is set while the model's initialize returns
        while not self._closing.wait(_WATCH_SECONDS):
            now = time.monotonic()
            with self._lock:
                pending, streams = list(self._pending.values()), list(self._streams.values())
            if self._prompts is not None:
                self._reports.guarded(self._prompts.end_waiting)
            for each in pending:
                self._reports.guarded(partial(self._cancel_if_client_gone, each))
            for stream in streams:
                self._reports.guarded(partial(self._look_after, stream, now))
            if now - flushed >= _FLUSH_SECONDS:
                flushed = now
                self._reports.guarded(self._flush)
        self._flush()

    def _flush(self) -> None:
        self._reports.recorder.flush(self._engine.stats(), waiting=self._waiting_prompts())

    def _cancel_if_client_gone(self, pending: _Pending) -> None:
        if pending.ticket is not None and not pending.client_gone and pending.reply.is_cancelled():
            pending.client_gone = True
            pending.ticket.cancel()

    def _look_after(self, stream: Stream, now: float) -> None:
        if stream.beat(now):
            self._to_answer.put(stream.answer)
        if stream.is_read or stream.is_cancelled():
            self._forget_stream(stream)


def _check_parameters(parameters: Mapping[str, str | int | float | bool]) -> None:
    """Refuse keys that no field has: in JSON, a misspelt field arrives as a parameter and would be passed over."""
    for name in parameters:
        if name.lower() not in _SERVER_PARAMETERS and not name.startswith("triton_"):
            raise RequestError(f"{clipped(name)} is no field of a request. See the repository's README for those.")


def _check_unused(fields: Mapping[str, Field], *names: str) -> None:
    for name in names:
        if name in fields:
            raise RequestError(f"{name} belongs to the commands next and cancel. Leave it out.")
