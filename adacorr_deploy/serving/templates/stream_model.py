"""Streams for clients: a decoupled model without engines of its own, which fetches progress from the model beside it.

It stands alone in its repository folder, so it uses nothing but NumPy and what Triton brings. A request has the fields
of the sampling model. Each message is a response: progress (with previews, if asked for), and at last the result.
"""

from __future__ import annotations

import json
import threading
from typing import Final

import numpy as np
import triton_python_backend_utils as pb_utils

MOST_STREAMS: Final = 64  # each has a thread, which waits for the sampling model


class RefusedError(Exception):
    """An error of the sampling model, or of ours, to be passed on."""

    def __init__(self, error: pb_utils.TritonError) -> None:
        super().__init__(error.message())
        self.error = error


class TritonPythonModel:
    """One thread per stream; all of them together do next to nothing."""

    def initialize(self, args: dict[str, str]) -> None:
        self._target: str = json.loads(args["model_config"])["parameters"]["model"]["string_value"]
        self._places = threading.Semaphore(MOST_STREAMS)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(request, sender), daemon=True).start()
            else:
                full = f"{MOST_STREAMS} streams are open, no more are taken. Try again later."
                _fail(sender, pb_utils.TritonError(full, pb_utils.TritonError.UNAVAILABLE))

    def _serve(self, request: pb_utils.InferenceRequest, sender: pb_utils.InferenceResponseSender) -> None:
        try:
            self._pump(request, sender)
        except RefusedError as refused:
            _fail(sender, refused.error)
        finally:
            self._places.release()

    def _pump(self, request: pb_utils.InferenceRequest, sender: pb_utils.InferenceResponseSender) -> None:
        stream = str(_event(self._ask(request, "submit", list(request.inputs())))["stream"])
        step, last = 0, False
        while not last:
            response = self._ask(request, "next", [_text("stream", stream), _number("after_step", step)])
            event = _event(response)
            last = event["type"] != "progress"
            if sender.is_cancelled():
                if not last:
                    self._ask(request, "cancel", [_text("stream", stream)])
                raise RefusedError(pb_utils.TritonError("Cancelled by the client.", pb_utils.TritonError.CANCELLED))
            now = int(event.get("step", step))
            if last or now > step:  # else only a sign of life, which lets us look after the client
                flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
                sender.send(pb_utils.InferenceResponse(response.output_tensors()), flags=flags)
            step = now

    def _ask(
        self, request: pb_utils.InferenceRequest, command: str, inputs: list[pb_utils.Tensor]
    ) -> pb_utils.InferenceResponse:
        """Send a command to the sampling model and wait for its answer."""
        question = pb_utils.InferenceRequest(
            model_name=self._target,
            request_id=request.request_id(),
            requested_output_names=list({*request.requested_output_names(), "event"}),
            inputs=[*inputs, _text("command", command)],
            parameters=_parameters(request) if command == "submit" else {},
        )
        response = question.exec()
        if response.has_error():
            raise RefusedError(response.error())
        return response


def _fail(sender: pb_utils.InferenceResponseSender, error: pb_utils.TritonError) -> None:
    flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(pb_utils.InferenceResponse(error=error), flags=flags)


def _parameters(request: pb_utils.InferenceRequest) -> dict[str, str | int | bool]:
    """Return the client's, and the trace's id as one: a server of 24.10 that is handed the trace itself crashes."""
    parameters: dict[str, str | int | bool] = json.loads(request.parameters() or "{}")
    context = request.trace().get_context()
    return {**parameters, "triton_trace": context} if context else parameters


def _event(response: pb_utils.InferenceResponse) -> dict[str, str | int | float]:
    (event,) = [tensor for tensor in response.output_tensors() if tensor.name() == "event"]
    values: dict[str, str | int | float] = json.loads(event.as_numpy()[0])
    return values


def _text(name: str, value: str) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([value.encode()], dtype=np.object_))


def _number(name: str, value: int) -> pb_utils.Tensor:
    return pb_utils.Tensor(name, np.array([value], dtype=np.int64))
