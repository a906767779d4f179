"""A replayed graph does what the launch does, or the launch stays as it is and says why."""

from __future__ import annotations

import gc
from collections.abc import Callable

import numpy as np
import pytest

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.cuda_core import CudaStream
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.host_memory import HostBuffer
from tests.engines.conftest import DriverCount

pytestmark = pytest.mark.gpu

Enqueue = Callable[[CudaStream], None]


class Engine:
    """An engine that moves a row of a buffer on: row i → row i + 1."""

    def __init__(self, device: Device, buffer: DeviceBuffer, row: int) -> None:
        self.device = device
        self.buffer = buffer
        self.row = row
        self.runs = 0
        self.on_stream = 0  # how often it was put on a stream, to run or to be captured

    def enqueue(self, stream: CudaStream) -> None:
        self.on_stream += 1
        source, target = self.buffer[self.row], self.buffer[self.row + 1]
        self.device.cuda.call("cuMemcpyAsync", target.address, source.address, source.size_bytes, stream.handle)

    def allocate_and_enqueue(self, stream: CudaStream) -> None:
        (address,) = self.device.cuda.call("cuMemAlloc", 256)
        self.enqueue(stream)
        self.device.cuda.call("cuMemFree", address)

    def _count(self) -> None:
        self.runs += 1

    def launch(
        self, enqueue: Enqueue | None = None, *, capturable: bool = True, own_graph: bool = True
    ) -> DeviceLaunch:
        return DeviceLaunch(
            self.device,
            f"part_{self.row}",
            enqueue or self.enqueue,
            on_run=self._count,
            keeps=(self.buffer,),
            capturable=capturable,
            own_graph=own_graph,
        )


def _rows(device: Device, count: int = 5) -> DeviceBuffer:
    return device.allocate((count, 3), DType.FLOAT32)


def _ramp(start: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.arange(start, start + 3, dtype=np.float32)


def test_the_second_run_captures_and_replays_do_the_same(device: Device) -> None:
    rows = _rows(device)
    engine = Engine(device, rows, 0)
    launch = engine.launch()
    for time in range(5):
        rows[0].write(_ramp(time))
        launch.run()
        np.testing.assert_array_equal(rows[1].read(), _ramp(time))
        assert launch.captured == (time > 0)
    assert (engine.runs, engine.on_stream, device.graph_launches) == (5, 2, 4)
    assert launch.capture_failure is None


def test_runs_do_not_wait(device: Device) -> None:
    launch = Engine(device, _rows(device), 0).launch()
    for _ in range(10):
        launch.run()
    assert (device.synchronisations, device.event_waits) == (0, 0)


@pytest.mark.parametrize(("capturable", "own_graph"), [(False, True), (True, False)])
def test_what_shall_not_be_a_graph_is_none(device: Device, capturable: bool, own_graph: bool) -> None:
    rows = _rows(device)
    engine = Engine(device, rows, 0)
    launch = engine.launch(capturable=capturable, own_graph=own_graph)
    for time in range(3):
        rows[0].write(_ramp(time))
        launch.run()
    np.testing.assert_array_equal(rows[1].read(), _ramp(2))
    assert not launch.captured and engine.runs == engine.on_stream == 3


def test_an_engine_that_allocates_keeps_running_without_a_graph(device: Device) -> None:
    rows = _rows(device)
    engine = Engine(device, rows, 0)

    launch = engine.launch(engine.allocate_and_enqueue)
    for time in range(4):
        rows[0].write(_ramp(time))
        launch.run()
        np.testing.assert_array_equal(rows[1].read(), _ramp(time))
    assert not launch.captured and "CAPTURE" in str(launch.capture_failure)
    assert engine.runs == 4


def test_an_engine_with_a_stream_of_its_own_is_not_taken_for_captured(device: Device) -> None:
    rows = _rows(device)
    engine = Engine(device, rows, 0)
    launch = engine.launch(lambda stream: engine.enqueue(device.stream))
    for time in range(3):
        rows[0].write(_ramp(time))
        launch.run()
        np.testing.assert_array_equal(rows[1].read(), _ramp(time))
    assert not launch.captured and "put nothing on the stream" in str(launch.capture_failure)


def test_a_refused_start_names_the_part_and_is_not_counted(device: Device) -> None:
    engine = Engine(device, _rows(device), 3)

    def refuse(stream: CudaStream) -> None:
        raise RuntimeError("no tactic")

    with pytest.raises(EngineError, match=r"part_3: the engine failed to start on GPU 0 .*: no tactic"):
        engine.launch(refuse).run()
    assert engine.runs == 0


def test_a_launch_keeps_its_buffers(device: Device, driver_count: DriverCount) -> None:
    rows = _rows(device)
    first, second = rows[0].address, rows[1].address

    def enqueue(stream: CudaStream) -> None:  # as an engine does, it knows the addresses only
        device.cuda.call("cuMemcpyAsync", second, first, 12, stream.handle)

    launch = DeviceLaunch(device, "part", enqueue, on_run=lambda: None, keeps=(rows,))
    launch.run()
    launch.run()
    del rows
    gc.collect()
    assert driver_count("live_allocations") == 1
    launch.run()
    device.synchronize()
    del launch
    gc.collect()
    assert driver_count("live_allocations") == driver_count("live_executables") == 0


def _chain(device: Device, rows: DeviceBuffer) -> tuple[list[Engine], list[DeviceLaunch]]:
    engines = [Engine(device, rows, row) for row in range(4)]
    launches = [engine.launch(own_graph=False) for engine in engines]
    for launch in launches:
        launch.run()
    return engines, launches


def test_fused_launches_do_the_same_in_order_and_all_are_counted(device: Device) -> None:
    rows = _rows(device)
    engines, launches = _chain(device, rows)
    fused = device.fuse(launches)
    assert fused is not None
    for time in range(1, 4):
        rows[0].write(_ramp(10 * time))
        fused.run()
        np.testing.assert_array_equal(rows.read(), np.stack([_ramp(10 * time)] * 5))
        assert device.graph_launches == time
    assert fused.captured and fused.capture_failure is None
    assert [engine.runs for engine in engines] == [4] * 4
    assert [engine.on_stream for engine in engines] == [2] * 4


def test_fused_launches_can_be_fused(device: Device) -> None:
    rows = _rows(device)
    engines, launches = _chain(device, rows)
    first, second = device.fuse(launches[:2]), device.fuse(launches[2:])
    assert first is not None and second is not None
    whole = device.fuse([first, second])
    assert whole is not None
    rows[0].write(_ramp(7))
    whole.run()
    np.testing.assert_array_equal(rows[4].read(), _ramp(7))
    assert device.graph_launches == 1 and [engine.runs for engine in engines] == [2] * 4


def test_a_fused_launch_that_cannot_be_captured_runs_its_parts(device: Device) -> None:
    rows = _rows(device)
    engines, launches = _chain(device, rows)
    launches[2] = engines[2].launch(engines[2].allocate_and_enqueue)
    launches[2].run()
    fused = device.fuse(launches)
    assert fused is not None
    for time in range(2):
        rows[0].write(_ramp(time))
        fused.run()
        np.testing.assert_array_equal(rows[4].read(), _ramp(time))
    assert not fused.captured and "CAPTURE" in str(fused.capture_failure)
    assert [engine.runs for engine in engines] == [3, 3, 4, 3]


def test_what_gains_nothing_or_cannot_be_one_graph_is_not_fused(device: Device) -> None:
    rows = _rows(device)
    engines, launches = _chain(device, rows)
    fixed = engines[0].launch(capturable=False)
    fixed.run()
    assert device.fuse(launches[:1]) is None
    assert device.fuse([]) is None
    assert device.fuse([launches[0], engines[1].launch()]) is None, "the second has not run yet"
    assert device.fuse([launches[0], fixed]) is None
    with Device.open() as second:
        foreign = Engine(second, _rows(second), 0).launch()
        foreign.run()
        assert device.fuse([launches[0], foreign]) is None


def test_a_host_backends_launch_is_not_fused(device: Device) -> None:
    class HostLaunch:
        def run(self) -> None:
            HostBuffer.allocate((1,), DType.FLOAT32)

    _, launches = _chain(device, _rows(device))
    assert device.fuse([launches[0], HostLaunch()]) is None


def test_with_graphs_off_everything_stays_as_it_is(device: Device) -> None:
    rows = _rows(device)
    launches = [Engine(device, rows, row).launch() for row in range(2)]
    device.graphs = False
    for _ in range(3):
        for launch in launches:
            launch.run()
    assert not any(launch.captured or launch.capture_failure for launch in launches)
    assert device.fuse(launches) is None
    device.graphs = True
    launches[0].run()
    assert launches[0].captured and device.fuse(launches) is not None
