"""A plan's launches take the addresses that they were bound to, whatever else shares the plan, its context or memory.

Runs under the stand-in for NVIDIA's driver (test_stand_in_driver.py starts it), with a stand-in for the module too:
it holds our side of the API, and says nothing of TensorRT's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.backend import Artefact
from adacorr_deploy.engines.decision_graphs import Switch
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.tensorrt_modules import TENSORRT_RTX
from adacorr_deploy.engines.tensorrt_session import Plans, TensorRTSession
from tests.engines import fake_tensorrt
from tests.engines.onnx_graphs import WIDTH, part_spec
from tests.engines.test_device_decisions import Board

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("STAND_IN_DRIVER" not in os.environ, reason="the stand-in module needs the stand-in driver"),
]
MODULE: ModuleType = fake_tensorrt


@pytest.fixture
def opened(device: Device) -> Iterator[Plans]:
    plans = Plans(TENSORRT_RTX, MODULE, device)
    yield plans
    plans.close()


def plan_file(folder: Path, *tensors: str, refuses: bool = False) -> Path:
    path = folder / "part.engine"
    path.write_text(json.dumps({"tensors": tensors or ("x", "y"), "most_rows": 8, "refuses": refuses}))
    return path


def buffers(device: Device, rows: int, value: float) -> dict[str, DeviceBuffer]:
    made = {name: device.allocate((rows, WIDTH), DType.FLOAT32) for name in ("x", "y")}
    made["x"].write(np.full((rows, WIDTH), value, np.float32))
    return made


def test_launches_that_share_a_context_keep_their_own_buffers(opened: Plans, device: Device, tmp_path: Path) -> None:
    session = TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path)))
    bound = [buffers(device, 3, value) for value in (1.0, 2.0)]
    launches = [session.bind(each) for each in bound]
    for _ in range(4):  # as it is, then captured, then replayed
        for each in bound:
            each["y"].write(np.zeros((3, WIDTH), np.float32))
        for launch in launches:
            launch.run()
        assert [float(each["y"].read()[0, 0]) for each in bound] == [1.0, 2.0]
    assert session.launches == 8
    assert all(launch.captured for launch in launches)


def test_plans_run_as_cases_of_a_graph_that_decides(opened: Plans, device: Device, tmp_path: Path) -> None:
    """Both cases share a context and its scratch, as those of a block do that is evaluated to one place or another."""
    session = TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path)))
    bound = [buffers(device, 3, value) for value in (1.0, 2.0, 3.0)]
    board = Board(device)
    cases = tuple((session.bind(each), board.note()) for each in bound)
    graph = board.graphs.record("step", [Switch(decision=board.decision, cases=cases)])
    board.decision.filled.write(np.array([0]))
    for temporal, chosen in ((2.0, 0), (0.1, 1), (0.9, 2)):
        for each in bound:
            each["y"].write(np.zeros((3, WIDTH), np.float32))
        board.steer(temporal)
        board.at(2)
        graph.run()
        expected = [value if case == chosen else 0.0 for case, value in enumerate((1.0, 2.0, 3.0))]
        assert [float(each["y"].read()[0, 0]) for each in bound] == expected


def test_scratch_memory_that_grew_leaves_the_launches_of_before_theirs(
    opened: Plans, device: Device, tmp_path: Path
) -> None:
    session = TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path)))
    small, large = buffers(device, 1, 1.0), buffers(device, 8, 2.0)
    first = session.bind(small)
    first.run()
    second = session.bind(large)
    for launch in (second, first, first, second):
        launch.run()
    assert float(small["y"].read()[0, 0]) == 1.0
    assert float(large["y"].read()[7, WIDTH - 1]) == 2.0


def test_parts_of_one_structure_share_the_plan_and_have_their_own_weights(
    opened: Plans, device: Device, tmp_path: Path
) -> None:
    plan = plan_file(tmp_path, "x", "w", "y")
    sessions = []
    for index, value in enumerate((10.0, 20.0)):
        weights = tmp_path / f"block_{index}.safetensors"
        save_file({"w": np.full((3, WIDTH), value, np.float32)}, weights)
        spec = part_spec(f"block_{index}")
        sessions.append(TensorRTSession(spec, opened, Artefact(path=plan, weights=weights)))
    assert opened._runtime.opened == 1
    for session, value in zip(sessions, (11.0, 21.0), strict=True):
        bound = buffers(device, 3, 1.0)
        session.bind(bound).run()
        assert float(bound["y"].read()[0, 0]) == value


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.zeros((2, WIDTH), np.float32), r"weight w is \(2, 4\), and its plan takes \(3, 4\)"),
        (np.zeros((3, WIDTH), np.int64), r"weight w is I64, known are F32, F16, BF16"),
    ],
)
def test_weights_that_the_plan_would_read_past_are_refused(
    opened: Plans, tmp_path: Path, weight: np.ndarray[tuple[int, ...], np.dtype[np.generic]], message: str
) -> None:
    weights = tmp_path / "block_00.safetensors"
    save_file({"w": weight}, weights)
    artefact = Artefact(path=plan_file(tmp_path, "x", "w", "y"), weights=weights)
    with pytest.raises(EngineError, match=message):
        TensorRTSession(part_spec(), opened, artefact)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_weights_arrive_bit_for_bit(opened: Plans, tmp_path: Path, dtype: str) -> None:
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4)
    header = json.dumps({"w": {"dtype": dtype, "shape": [3, 4], "data_offsets": [0, 24]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    (buffer,) = opened.upload(path, "block_00").values()
    np.testing.assert_array_equal(buffer.read().view(np.uint16), bits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"other", r"part: .*part.engine can't run on GPU 0 .*: unsupported cc, old cuda driver. Rebuild"),
        (b"no plan", r"part: TensorRT for RTX can't open .*magicTag does not match. Rebuild"),
    ],
)
def test_a_plan_for_another_machine_or_none_says_so(
    opened: Plans, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "part.engine"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=message):
        TensorRTSession(part_spec(), opened, Artefact(path=path))


def test_a_plan_with_other_tensors_names_them(opened: Plans, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"part: the plan's tensors and those of its spec and weights differ in w, z"):
        TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path, "x", "y", "w", "z")))


def test_sizes_outside_the_profile_say_which_tensor_and_what_to_do(
    opened: Plans, device: Device, tmp_path: Path
) -> None:
    session = TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path)))
    with pytest.raises(EngineError, match=rf"part: x of shape \(9, {WIDTH}\) is outside the plan's profile .*--batch"):
        session.bind(buffers(device, 9, 1.0))


def test_an_engine_that_refuses_to_start_is_named_with_its_reason(
    opened: Plans, device: Device, tmp_path: Path
) -> None:
    session = TensorRTSession(part_spec("head"), opened, Artefact(path=plan_file(tmp_path, refuses=True)))
    launch = session.bind(buffers(device, 2, 1.0))
    with pytest.raises(EngineError, match="head: the engine failed to start: the launch was refused"):
        launch.run()
    assert session.launches == 0


def test_what_does_not_fit_says_how_much_the_part_takes_and_how_much_is_free(
    opened: Plans, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(device), "memory_bytes", lambda self: (10, 100 << 20))
    with pytest.raises(EngineError, match=r"part takes 0 MiB of GPU 0 .*, and 0 of 100 MiB are free.*--inspect"):
        TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path)))


def test_a_closed_session_launches_nothing_new_and_what_is_bound_runs_on(
    opened: Plans, device: Device, tmp_path: Path
) -> None:
    session = TensorRTSession(part_spec(), opened, Artefact(path=plan_file(tmp_path)))
    bound = buffers(device, 2, 3.0)
    launch = session.bind(bound)
    session.close()
    launch.run()
    assert float(bound["y"].read()[0, 0]) == 3.0
    with pytest.raises(EngineError, match="the session is closed"):
        session.bind(bound)


def test_the_other_module_gives_contexts_without_a_runtime_config() -> None:
    """TensorRT takes the strategy itself; only TensorRT for RTX specialises kernels when it runs."""

    class Recording:
        def create_execution_context(self, how: object) -> object:
            return how

    module = replace(TENSORRT_RTX, specialises_kernels=False)
    made = module.new_context(MODULE, Recording())  # type: ignore[arg-type]
    assert made is MODULE.ExecutionContextAllocationStrategy.USER_MANAGED
