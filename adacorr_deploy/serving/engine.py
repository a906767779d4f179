"""What the server needs of an engine that samples requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adacorr_deploy.caching.policy import Policy
from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.runtime import Progress, SampleRequest, SampleResult

OnPreview = Callable[[int, NDArray[np.float32]], None]  # finished steps, latents (B, C, H, W)


class EngineStats(Protocol):
    """A snapshot."""

    @property
    def queue_depth(self) -> int: ...
    @property
    def active_requests(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def occupancy(self) -> float: ...
    @property
    def launches(self) -> int: ...
    @property
    def guard_trips(self) -> int: ...


class Finished(Protocol):
    """How a request ended: with a result or an error."""

    @property
    def result(self) -> SampleResult | None: ...
    @property
    def error(self) -> AdaCorrError | None: ...
    @property
    def queue_seconds(self) -> float: ...
    @property
    def seconds(self) -> float: ...


class Ticket(Protocol):
    """A request that was taken in."""

    def cancel(self) -> None: ...


class Engine(Protocol):
    """Takes requests from any thread; the callbacks come from a thread of its own."""

    def submit(
        self,
        request: SampleRequest,
        policy: Policy,
        *,
        deadline: float | None = None,
        on_step: Progress | None = None,
        on_done: Callable[[Finished], None],
        preview_every: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Ticket: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...
