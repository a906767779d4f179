"""A graph's switch runs what its kernel decides, and the host learns of it only from the trace."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from adacorr_deploy.caching.block_rules import BlockRule
from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.cuda_core import CudaStream
from adacorr_deploy.engines.decision_graphs import BlockDecision, Switch
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_decisions import DeviceDecisions
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.host_memory import HostBuffer
from adacorr_deploy.plugins.decision_kernels import CASES, NEVER, RECORD_COLUMNS, RULE_COLUMNS, Verdict, rule_row
from adacorr_deploy.plugins.decision_oracle import decide
from adacorr_deploy.plugins.kernel_compiler import DECISIONS_PROGRAM, compile_kernels
from adacorr_deploy.plugins.service_parts import SIGNAL_COUNT
from tests.engines.conftest import DriverCount

pytestmark = pytest.mark.gpu

STEPS, BLOCKS, BLOCK, IMAGES = 8, 3, 1, 2
ROWS = 2 * IMAGES
RULE = BlockRule(
    lambda_=0.5,
    gamma=1.0,
    epsilon=0.1,
    floor=0.25,
    lazy=True,
    warmup_steps=1,
    final_steps=1,
    max_age_steps=3,
    protected=False,
)
EVALUATED, REUSED, CORRECTED = (float(number) for number in range(1, 4))  # what each case leaves in the output


class Board:
    """A decision and its buffers; each case writes its own number into `out`."""

    def __init__(self, device: Device, rule: BlockRule = RULE) -> None:
        self.device = device
        self.rule = rule
        self.graphs = DeviceDecisions(device, compile_kernels(program=DECISIONS_PROGRAM))
        self.decision = BlockDecision(
            signals=device.allocate((ROWS, SIGNAL_COUNT), DType.FLOAT32),
            step=device.allocate((1,), DType.INT64),
            filled=device.allocate((1,), DType.INT64),
            rule=device.allocate((len(RULE_COLUMNS),), DType.INT64),
            scores=device.allocate((ROWS,), DType.FLOAT32),
            trace=device.allocate((STEPS, BLOCKS, len(RECORD_COLUMNS)), DType.INT64),
            images=IMAGES,
            block=BLOCK,
        )
        self.launches = device.allocate((1,), DType.INT64)
        self.out = device.allocate((3,), DType.FLOAT32)
        self.values = [self.filled_with(value) for value in (EVALUATED, REUSED, CORRECTED)]
        self.decision.rule.write(rule_row(rule))
        self.decision.filled.write(np.array([NEVER]))
        self.runs = 0

    def filled_with(self, value: float) -> DeviceBuffer:
        buffer = self.device.allocate((3,), DType.FLOAT32)
        buffer.write(np.full(3, value, np.float32))
        return buffer

    def note(self) -> DeviceLaunch:
        decision = self.decision
        return self.graphs.note_evaluation(step=decision.step, filled=decision.filled, launches=self.launches)

    def engine(self, value: DeviceBuffer) -> DeviceLaunch:
        def enqueue(stream: CudaStream) -> None:
            self.device.cuda.call("cuMemcpyAsync", self.out.address, value.address, 12, stream.handle)

        return DeviceLaunch(self.device, "engine", enqueue, on_run=self._count, keeps=(value, self.out))

    def _count(self) -> None:
        self.runs += 1

    def switch(self) -> Switch:
        evaluated, reused, corrected = (self.engine(value) for value in self.values)
        return Switch(decision=self.decision, cases=((evaluated, self.note()), (reused,), (corrected, self.note())))

    def steer(self, temporal: float) -> None:
        """Make the score of every branch λ·0 + temporal²."""
        rows = np.zeros((ROWS, SIGNAL_COUNT), np.float32)
        rows[:, 3] = temporal
        self.decision.signals.write(rows)

    def at(self, step: int) -> None:
        self.decision.step.write(np.array([step]))


# The score of each step: below the floor, within it and 1, and beyond; then one that is no number.
SCRIPT: Sequence[float] = (0.0, 0.3, 0.9, 2.0, 0.2, float("nan"), 0.0, 0.0)


def test_a_request_is_decided_without_a_host(device: Device, driver_count: DriverCount) -> None:
    board = Board(device)
    graph = board.graphs.record("step", [board.switch()])
    board.launches.write(np.zeros(1, np.int64))
    board.decision.filled.write(np.array([NEVER]))
    nodes, waits = driver_count("conditional_nodes"), driver_count("stream_waits")
    outputs = []
    for step, temporal in enumerate(SCRIPT):
        board.at(step)
        board.steer(temporal)
        graph.run()
        outputs.append(board.out.read_later())
    assert driver_count("stream_waits") == waits, "the whole request is queued before anybody waits"
    trace = board.decision.trace.read()[:, BLOCK]
    assert driver_count("conditional_nodes") - nodes == STEPS

    filled, evaluations, actions = NEVER, 0, []
    for step, temporal in enumerate(SCRIPT):
        rows = np.zeros((ROWS, SIGNAL_COUNT), np.float32)
        rows[:, 3] = temporal
        expected = decide(RULE, rows, images=IMAGES, step=step, steps=STEPS, filled=filled)
        assert Verdict.of(trace[step]) == expected, step
        actions.append(CASES[expected.action])
        assert outputs[step]()[0] == (EVALUATED, REUSED, CORRECTED)[expected.action]
        if actions[-1] != "reuse":
            filled, evaluations = step, evaluations + 1
    assert set(actions) == set(CASES), "the script must take every case"
    assert board.launches.read()[0] == evaluations
    assert board.decision.filled.read()[0] == filled


def test_a_run_counts_what_stands_outside_of_switches_and_the_rest_is_told(device: Device) -> None:
    board = Board(device)
    before, after = board.engine(board.values[0]), board.engine(board.values[1])
    for launch in (before, after):
        launch.run()
    switch = board.switch()
    graph = board.graphs.record("step", [before, switch, after])
    warmed_up = board.runs
    assert warmed_up == 2 + 3, "what has not run yet runs once, so that engines allocate before the capture"
    board.at(0)
    for _ in range(4):
        graph.run()
    assert board.runs - warmed_up == 8
    board.graphs.count(switch.cases[0][0], 3)
    assert board.runs - warmed_up == 11
    assert device.graph_launches == 4


def test_without_a_decision_the_block_is_evaluated(device: Device) -> None:
    """A step outside the run sets no condition: its default does."""
    board = Board(device)
    graph = board.graphs.record("step", [board.switch()])
    board.decision.trace.write(np.zeros((STEPS, BLOCKS, len(RECORD_COLUMNS)), np.int64))
    for step in (0, NEVER):
        board.at(step)
        board.out.write(np.zeros(3, np.float32))
        graph.run()
        assert board.out.read()[0] == EVALUATED
    assert not board.decision.trace.read()[1:].any()


def test_switches_of_one_graph_decide_by_themselves(device: Device) -> None:
    """The second sees what the first has left: it decides on a filled slot."""
    board = Board(device, replace(RULE, warmup_steps=0))
    second = replace(board.decision, block=2)
    graph = board.graphs.record(
        "step", [board.switch(), Switch(decision=second, cases=board.switch().cases), board.note()]
    )
    board.decision.filled.write(np.array([NEVER]))
    board.steer(0.0)
    board.at(3)
    graph.run()
    records = [Verdict.of(record) for record in board.decision.trace.read()[3]]
    assert [(record.action, record.age) for record in records[1:]] == [(0, NEVER), (1, 0)]


def test_a_graph_keeps_its_buffers_and_frees_everything(driver_count: DriverCount) -> None:
    with Device.open() as device:
        board = Board(device)
        graph = board.graphs.record("step", [board.switch()])
        board.at(0)
        del board
        gc.collect()
        graph.run()
        device.synchronize()
        del graph
        gc.collect()
        for kind in ("executables", "graphs", "allocations", "user_objects"):
            assert driver_count(f"live_{kind}") == 0, kind


def test_what_cannot_be_captured_is_refused_by_name(device: Device) -> None:
    board = Board(device)
    fixed = DeviceLaunch(device, "block_07", lambda stream: None, on_run=lambda: None, keeps=(), capturable=False)
    switch = Switch(decision=board.decision, cases=((fixed,), (board.note(),)))
    with pytest.raises(EngineError, match=r'block_07 can.t be a part of a graph that decides: .* decide = "block"'):
        board.graphs.record("step", [switch])

    def allocate(stream: CudaStream) -> None:
        (address,) = device.cuda.call("cuMemAlloc", 256)
        board.engine(board.values[0]).enqueue(stream)
        device.cuda.call("cuMemFree", address)

    greedy = DeviceLaunch(device, "block_08", allocate, on_run=lambda: None, keeps=())
    with pytest.raises(EngineError, match=r'CAPTURE.* decide = "block"'):
        board.graphs.record("step", [Switch(decision=board.decision, cases=((greedy,),))])
    board.graphs.record("step", [board.switch()]).run()
    device.synchronize()


def test_a_case_may_not_call_the_host(device: Device, driver_count: DriverCount) -> None:
    """As on a GPU; what tests put in the place of engines must not pass where engines would fail."""
    driver_count("operations")
    board = Board(device)
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
    driver = ctypes.CDLL("libcuda.so.1")

    def enqueue(stream: CudaStream) -> None:
        assert driver.cuLaunchHostFunc(ctypes.c_void_p(int(stream.handle)), callback, None) == 0

    calling = DeviceLaunch(device, "calling", enqueue, on_run=lambda: None, keeps=(callback,))
    board.graphs.record("outside of cases it may", [calling, board.switch()])
    with pytest.raises(EngineError, match="NOT_SUPPORTED"):
        board.graphs.record("step", [Switch(decision=board.decision, cases=((calling,),))])
    device.synchronize()  # while the callback is alive


def test_what_is_not_of_the_device_is_refused(device: Device) -> None:
    class HostLaunch:
        def run(self) -> None:
            HostBuffer.allocate((1,), DType.FLOAT32)

    board = Board(device)
    with pytest.raises(EngineError, match="A HostLaunch can't be a part of a graph of GPU 0"):
        board.graphs.record("step", [HostLaunch()])
    with pytest.raises(EngineError, match="Expected a buffer of GPU 0"):
        board.graphs.copy(board.out, HostBuffer.allocate((3,), DType.FLOAT32))
    with pytest.raises(EngineError, match=r"shape \(3,\), float32 can't take one of \(1,\), int64"):
        board.graphs.copy(board.out, board.launches)
