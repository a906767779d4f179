"""Launches on a GPU: run once as they are, then captured into a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.engines.backend import Launch
from adacorr_deploy.engines.cuda_core import CudaGraph, CudaGraphBuilder, CudaStream

if TYPE_CHECKING:
    from adacorr_deploy.engines.device import Device

# A capture must not hide what it can't record: in this mode the driver ends it when this thread calls something that
# is not put on the stream (an allocation, a blocking copy).
CAPTURE_MODE = "thread_local"


class DeviceLaunch:
    """Work that can be put on a stream, over addresses that don't change.

    The first run puts it on the device's stream: engines then allocate and choose what they need. The second captures
    it, and from then on its graph is launched. Where the capture fails, every run puts it on the stream as the first.

    Attributes:
        capture_failure: Why there is no graph; None where there is one, or no capture was tried.
    """

    def __init__(
        self,
        device: Device,
        name: str,
        enqueue: Callable[[CudaStream], None],
        *,
        on_run: Callable[[], None],
        keeps: Sequence[object],
        capturable: bool = True,
        own_graph: bool = True,
        has_run: bool = False,
    ) -> None:
        """Take what to run.

        Args:
            device: Where.
            name: Of the part, for errors.
            enqueue: Puts the work on the stream that it is given, without waiting for it. It is called anew for every
                run that isn't a replay; a replay repeats the addresses and values of the capture.
            on_run: Called after each run, for the session to count it.
            keeps: What must live as long as the launch: the buffers, since work holds bare addresses.
            capturable: Whether `enqueue` may be captured at all: everything it does goes to the stream it is given.
            own_graph: Whether it becomes a graph by itself, and not only as a part of a fused launch. A single kernel
                gains nothing by it.
            has_run: Whether its work has run before, so that the first run may capture.
        """
        self.device = device
        self.name = name
        self.capturable = capturable
        self.capture_failure: str | None = None
        self._enqueue = enqueue
        self._on_run = on_run
        self._keeps = tuple(keeps)
        self._own_graph = own_graph
        self._has_run = has_run
        self._graph: CudaGraph | None = None

    @property
    def captured(self) -> bool:
        """Whether runs replay a graph."""
        return self._graph is not None

    @property
    def has_run(self) -> bool:
        return self._has_run

    def run(self) -> None:
        """Put the work on the device's stream, and don't wait for it.

        Raises:
            EngineError: If it is refused; the message names the part. A failure on the GPU shows at the next wait.
        """
        self.device.make_current()
        if self._graph is None and self._may_capture():
            self._try_capture()
        if self._graph is None:
            self.enqueue(self.device.stream)
            self._has_run = True
        else:
            with self.device.errors(f"{self.name}: its graph can't be launched"):
                self._graph.launch(self.device.stream)
            self.device.graph_launches += 1
        self.count()

    def warm_up(self) -> None:
        """Run it once if it has not run: what captures it elsewhere needs that done.

        Raises:
            EngineError: If it is refused.
        """
        if not self._has_run:
            self.run()

    def record(self, builder: CudaGraphBuilder) -> None:
        """Put the work on the stream of a recorder, as a part of a larger graph.

        Raises:
            EngineError: If it is refused.
        """
        self.enqueue(builder.stream)

    def enqueue(self, stream: CudaStream) -> None:
        """Put the work on a stream as it is; `run` is the way in.

        Raises:
            EngineError: If it is refused.
        """
        with self.device.errors(f"{self.name}: the engine failed to start"):
            self._enqueue(stream)

    def count(self) -> None:
        """Let the session count a run."""
        self._on_run()

    def _may_capture(self) -> bool:
        return self.device.graphs and self.capturable and self._has_run and self._own_graph

    def _try_capture(self) -> None:
        try:
            self._graph = capture(self.device, self.name, self.record)
        except EngineError as error:
            self.capture_failure = str(error)
            self.capturable = False


def capture(device: Device, name: str, build: Callable[[CudaGraphBuilder], None]) -> CudaGraph:
    """Record what `build` puts on the stream of a recorder.

    The stream is one of its own, so that memory which is freed meanwhile is not recorded.

    Raises:
        EngineError: If something can't be recorded, or nothing was.
    """
    with device.errors(f"{name}: can't be captured"):
        builder: CudaGraphBuilder = device.graph_builder()
        try:
            builder.begin_building(CAPTURE_MODE)
            build(builder)
            builder.end_building()
            if not device.cuda.node_count(builder.graph_definition):
                raise EngineError(f"{name}: can't be captured: it put nothing on the stream that it was given.")
            return builder.complete()
        finally:
            with suppress(*device.cuda.errors):  # it ends a broken capture, and would hide what broke it
                builder.close()


def fused_launch(device: Device, launches: Sequence[Launch]) -> DeviceLaunch | None:
    """Return the launches as one, or None if that saves nothing; `Device.fuse` is the way in."""
    members = [launch for launch in launches if isinstance(launch, DeviceLaunch) and launch.device is device]
    if not device.graphs or len(launches) < 2 or len(members) < len(launches):
        return None
    if not all(member.capturable and member.has_run for member in members):
        return None

    def enqueue(stream: CudaStream) -> None:
        for member in members:
            member.enqueue(stream)

    def count() -> None:
        for member in members:
            member.count()

    name = f"{members[0].name} … {members[-1].name}"
    return DeviceLaunch(device, name, enqueue, on_run=count, keeps=members, has_run=True)
