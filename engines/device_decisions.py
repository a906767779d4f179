"""Decisions within CUDA graphs: a kernel sets the condition of a switch node, and the GPU runs one of its cases.

No host takes part: the graphs of a whole request may be queued before the first has run. Written against cuda.core and
tested on the stand-in for the driver; it has not run on hardware.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Buffer, Launch
from adacorr_deploy.engines.cuda_core import CudaGraph, CudaGraphBuilder, CudaStream
from adacorr_deploy.engines.decision_graphs import DECIDE_ON_HOST, BlockDecision, Switch
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import CAPTURE_MODE, DeviceLaunch, capture
from adacorr_deploy.engines.device_memory import DeviceBuffer, device_buffer
from adacorr_deploy.engines.kernel_session import KernelLibrary
from adacorr_deploy.plugins.decision_kernels import CASES, DECIDE_KERNEL, NEVER, NOTE_KERNEL, THREADS

_OLDEST_DRIVER: Final = (12, 8)  # CUDA's version that has switches in graphs


class _Recordable(Protocol):
    """A part of a graph that decides."""

    def warm_up(self) -> None:
        """Run once what has not run yet: engines allocate and choose then, and kernels are loaded."""
        ...

    def record(self, builder: CudaGraphBuilder) -> None: ...

    def count(self) -> None:
        """Let sessions count what runs whenever the graph does."""
        ...


class DeviceDecisions:
    """Makes graphs that decide on a device. One instance serves all workspaces."""

    def __init__(self, device: Device, ptx: bytes) -> None:
        """Load the kernels.

        Raises:
            EngineError: If the driver is too old, or can't load the PTX.
        """
        version = device.driver_version
        if tuple(int(number) for number in version.split(".")) < _OLDEST_DRIVER:
            raise EngineError(
                f"{device} has a driver for CUDA {version}, and graphs that decide need one for "
                f"{'.'.join(map(str, _OLDEST_DRIVER))} or later. Update the driver. {DECIDE_ON_HOST}"
            )
        self._device = device
        self._library = KernelLibrary(device, ptx)
        self._decide, self._note = (self._library.kernel(name) for name in (DECIDE_KERNEL, NOTE_KERNEL))
        self._config = device.cuda.launch_config((1, 1, 1), (THREADS, 1, 1), 0)
        self._nowhere = device.allocate((1,), DType.INT64)
        self._nowhere.write(np.array([NEVER], dtype=np.int64))

    def copy(self, target: Buffer, source: Buffer) -> DeviceLaunch:
        """Return a copy between two buffers of one shape and dtype, as a launch.

        Raises:
            EngineError: If they differ, or are not of this device.
        """
        to, of = self._bound(target, source)
        if (to.shape, to.dtype) != (of.shape, of.dtype):
            raise EngineError(
                f"A buffer of shape {to.shape}, {to.dtype.value} can't take one of {of.shape}, {of.dtype.value}."
            )

        def enqueue(stream: CudaStream) -> None:
            self._device.cuda.call("cuMemcpyAsync", to.address, of.address, of.size_bytes, stream.handle)

        return self._launch("copy", enqueue, (to, of))

    def note_evaluation(self, *, step: Buffer, filled: Buffer, launches: Buffer) -> DeviceLaunch:
        """Return what ends a case that evaluates: filled ← step, launches ← launches + 1; all (1,) int64."""
        bound = self._bound(step, filled, launches)
        addresses = [buffer.address for buffer in bound]

        def enqueue(stream: CudaStream) -> None:
            self._device.cuda.launch(stream, self._config, self._note, addresses)

        return self._launch(NOTE_KERNEL, enqueue, bound)

    def record(self, name: str, work: Sequence[Launch | Switch]) -> DecidingGraph:
        """Return one launch that does all this in order. What has not run yet is run once, over whatever is there.

        Raises:
            EngineError: If something of it can't be recorded; the message names it and says why.
        """
        parts = [self._recordable(item) for item in work]
        for part in parts:
            part.warm_up()
        return DecidingGraph(self._device, name, parts)

    def count(self, launch: Launch, times: int) -> None:
        """Let the session of a launch count runs that graphs have decided for."""
        for _ in range(times):
            self._own(launch).count()

    def _recordable(self, item: Launch | Switch) -> _Recordable:
        match item:
            case Switch():
                cases = tuple(tuple(self._own(launch) for launch in case) for case in item.cases)
                return _DeviceSwitch(
                    cases, self._decision(item.decision, item.decision.step), self._idle(item.decision)
                )
            case _:
                return self._own(item)

    def _decision(self, decision: BlockDecision, step: Buffer) -> Callable[[CudaStream, int], None]:
        """Return what puts a decision on a stream, given the condition that it is to set."""
        inputs = self._bound(decision.signals, step, decision.filled, decision.rule)
        outputs = self._bound(decision.scores, decision.trace)
        steps, blocks = decision.trace.shape[:2]
        sizes = (decision.signals.shape[0], decision.images, steps, decision.block, blocks)

        def enqueue(stream: CudaStream, condition: int) -> None:
            arguments = (
                *(buffer.address for buffer in inputs),
                *(ctypes.c_int32(size) for size in sizes),
                *(buffer.address for buffer in outputs),
                ctypes.c_uint64(condition),
            )
            self._device.cuda.launch(stream, self._config, self._decide, arguments)

        return enqueue

    def _idle(self, decision: BlockDecision) -> DeviceLaunch:
        """Return the same launch at a step outside any run: it decides nothing, and needs no condition."""
        enqueue = self._decision(decision, self._nowhere)
        return self._launch(DECIDE_KERNEL, lambda stream: enqueue(stream, 0), (decision,))

    def _launch(self, name: str, enqueue: Callable[[CudaStream], None], keeps: Sequence[object]) -> DeviceLaunch:
        return DeviceLaunch(
            self._device, name, enqueue, on_run=_nothing, keeps=(*keeps, self._library, self._nowhere), own_graph=False
        )

    def _bound(self, *buffers: Buffer) -> tuple[DeviceBuffer, ...]:
        return tuple(device_buffer(buffer, self._device) for buffer in buffers)

    def _own(self, launch: Launch) -> DeviceLaunch:
        """Return a launch as one of this device that a graph can hold.

        Raises:
            EngineError: If it is not.
        """
        if not isinstance(launch, DeviceLaunch) or launch.device is not self._device:
            raise EngineError(f"A {type(launch).__name__} can't be a part of a graph of {self._device}.")
        if not launch.capturable:
            reason = launch.capture_failure or "it does not only work on the stream that it is given"
            raise EngineError(f"{launch.name} can't be a part of a graph that decides: {reason}. {DECIDE_ON_HOST}")
        return launch


class _DeviceSwitch:
    """A switch node: the decision before it, and its cases."""

    def __init__(
        self,
        cases: tuple[tuple[DeviceLaunch, ...], ...],
        decide: Callable[[CudaStream, int], None],
        idle: DeviceLaunch,
    ) -> None:
        self._cases = cases
        self._decide = decide
        self._idle = idle  # keeps the decision's buffers, too

    def warm_up(self) -> None:
        self._idle.warm_up()
        for case in self._cases:
            for launch in case:
                launch.warm_up()

    def record(self, builder: CudaGraphBuilder) -> None:
        condition = builder.create_condition(default_value=CASES.index("evaluate"))  # if no one sets it
        self._decide(builder.stream, int(condition.handle))
        for body, case in zip(builder.switch(condition, len(self._cases)), self._cases, strict=True):
            try:
                body.begin_building(CAPTURE_MODE)
                for launch in case:
                    launch.record(body)
                body.end_building()
            finally:
                body.close()

    def count(self) -> None:
        """Nothing: what ran is known when the trace has been read."""


class DecidingGraph:
    """A recorded graph. The host that queues a run of it knows neither what it decides nor when."""

    def __init__(self, device: Device, name: str, parts: Sequence[_Recordable]) -> None:
        """Record the parts.

        Raises:
            EngineError: If one can't be recorded.
        """
        self._device = device
        self._name = name
        self._parts = tuple(parts)
        try:
            self._graph: CudaGraph = capture(device, name, self._record)
        except EngineError as error:
            raise EngineError(f"{error} {DECIDE_ON_HOST}") from error

    def run(self) -> None:
        """Queue a run, and don't wait for it.

        Raises:
            EngineError: If it is refused. A failure on the GPU shows at the next wait.
        """
        self._device.make_current()
        with self._device.errors(f"{self._name}: its graph can't be launched"):
            self._graph.launch(self._device.stream)
        self._device.graph_launches += 1
        for part in self._parts:
            part.count()

    def _record(self, builder: CudaGraphBuilder) -> None:
        for part in self._parts:
            part.record(builder)


def _nothing() -> None:
    """No session counts such a launch."""
