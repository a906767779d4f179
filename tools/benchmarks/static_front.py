"""Static batching in front of a server: requests of one policy that wait at the same time go as one, and end as one."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import tritonclient.grpc as triton
from serving_sides import Asked, Sides

from adacorr_deploy.runtime import SampleRequest
from adacorr_deploy.runtime.request import NoiseStream
from adacorr_deploy.serving.trial_server import inputs_of


@dataclass(slots=True, eq=False)
class _Waiting:
    asked: Asked
    done: threading.Event = field(default_factory=threading.Event)


class StaticFront:
    """Use it as a context manager, and `ask` from many threads."""

    def __init__(self, sides: Sides, *, images: int) -> None:
        """Make a front whose batches have up to so many images; it sends one for each lane of the server at a time."""
        self._sides = sides
        self._images = images
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: Exception | None = None
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(sides.lanes)]

    def __enter__(self) -> StaticFront:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def ask(self, asked: Asked) -> None:
        """Wait for a request's image. Errors of its batch are raised here."""
        waiting = _Waiting(asked)
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify()
        waiting.done.wait()
        if self._failure is not None:
            raise self._failure

    def _serve(self) -> None:
        with self._sides.server.client() as client:
            while batch := self._next():
                try:
                    self._sample(client, [each.asked for each in batch])
                except Exception as error:  # noqa: BLE001  every client of the batch is to see it
                    self._failure = error
                for each in batch:
                    each.done.set()

    def _next(self) -> list[_Waiting]:
        """Return the oldest request with those of its run that wait too; nothing once the front is closed."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            run = (self._waiting[0].asked.policy, self._waiting[0].asked.steps)
            batch = [each for each in self._waiting if (each.asked.policy, each.asked.steps) == run][: self._images]
            for each in batch:
                self._waiting.remove(each)
            return batch

    def _sample(self, client: triton.InferenceServerClient, batch: list[Asked]) -> None:
        shape = self._sides.pipeline.manifest.model.latent_shape
        noise = [
            NoiseStream(SampleRequest(each.labels, steps=each.steps, seed=each.seed), shape).at(0) for each in batch
        ]
        joint = Asked(
            labels=tuple(each.labels[0] for each in batch), seed=0, steps=batch[0].steps, policy=batch[0].policy
        )
        fields = {**joint.fields, "latents": np.concatenate(noise)}
        client.infer(self._sides.server.model, inputs_of(fields), outputs=[triton.InferRequestedOutput("latents")])
