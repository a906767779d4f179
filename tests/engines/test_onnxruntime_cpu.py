"""ONNX Runtime writes into the very memory it was bound to, once for each launch, and fails with the part's name."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.engines.backend import Artefact
from adacorr_deploy.engines.host_memory import HostBuffer
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend, OnnxRuntimeSession
from tests.engines.onnx_graphs import WIDTH, part_spec, tensor, write_part

BACKEND = OnnxRuntimeBackend(threads=1)
DOUBLE = "two = Constant <value_float = 2.0> () y = Mul (x, two)"


def open_part(folder: Path, body: str, spec: PartSpec | None = None) -> OnnxRuntimeSession:
    spec = spec or part_spec()
    return BACKEND.open(Artefact(path=write_part(folder, body, spec)), spec)


def filled(*shape: int, start: float = 1.0) -> HostBuffer:
    buffer = BACKEND.allocate(shape, DType.FLOAT32)
    buffer.write(numbers(*shape, start=start))
    return buffer


def numbers(*shape: int, start: float = 1.0) -> NDArray[np.float32]:
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def test_the_output_is_written_in_place(tmp_path: Path) -> None:
    x, y = filled(3, WIDTH), BACKEND.allocate((3, WIDTH), DType.FLOAT32)
    memory, address = y.array, y.address
    open_part(tmp_path, DOUBLE).bind({"x": x, "y": y}).run()
    np.testing.assert_array_equal(memory, 2 * numbers(3, WIDTH))
    assert y.address == address == memory.ctypes.data


@pytest.mark.parametrize("body", ["y = Identity (x)", "s = Constant <value_ints = [-1, 4]> () y = Reshape (x, s)"])
def test_an_output_that_is_its_input_is_copied_into_its_own_buffer(tmp_path: Path, body: str) -> None:
    x, y = filled(2, WIDTH), BACKEND.allocate((2, WIDTH), DType.FLOAT32)
    launch = open_part(tmp_path, body).bind({"x": x, "y": y})
    launch.run()
    x.write(numbers(2, WIDTH, start=50))
    np.testing.assert_array_equal(y.read(), numbers(2, WIDTH))
    launch.run()
    np.testing.assert_array_equal(y.read(), numbers(2, WIDTH, start=50))


def test_one_result_can_go_to_two_outputs(tmp_path: Path) -> None:
    spec = part_spec(outputs=(tensor("y"), tensor("unit")))
    buffers = {"x": filled(2, WIDTH), "y": filled(2, WIDTH), "unit": filled(2, WIDTH)}
    open_part(tmp_path, "y = Neg (x) unit = Identity (y)", spec).bind(buffers).run()
    np.testing.assert_array_equal(buffers["y"].read(), -numbers(2, WIDTH))
    np.testing.assert_array_equal(buffers["unit"].read(), -numbers(2, WIDTH))


def test_chained_parts_share_one_buffer_without_copies(tmp_path: Path) -> None:
    session = open_part(tmp_path, DOUBLE)
    x, between, y = filled(2, WIDTH), filled(2, WIDTH), filled(2, WIDTH)
    first, second = session.bind({"x": x, "y": between}), session.bind({"x": between, "y": y})
    first.run()
    between.write(numbers(2, WIDTH, start=100))  # seen by the second part only if it reads this very memory
    second.run()
    np.testing.assert_array_equal(y.read(), 2 * numbers(2, WIDTH, start=100))


def test_two_buffers_in_turn_carry_a_chain(tmp_path: Path) -> None:
    session = open_part(tmp_path, DOUBLE)
    ping, pong = filled(2, WIDTH), BACKEND.allocate((2, WIDTH), DType.FLOAT32)
    forth, back = session.bind({"x": ping, "y": pong}), session.bind({"x": pong, "y": ping})
    for launch in (forth, back, forth, back):
        launch.run()
    np.testing.assert_array_equal(ping.read(), 16 * numbers(2, WIDTH))
    assert session.launches == 4


def test_views_of_one_buffer_are_bound_where_they_lie(tmp_path: Path) -> None:
    slot = BACKEND.allocate((3, 2, WIDTH), DType.FLOAT32)
    open_part(tmp_path, DOUBLE).bind({"x": filled(2, WIDTH), "y": slot[1]}).run()
    np.testing.assert_array_equal(slot.read()[1], 2 * numbers(2, WIDTH))
    np.testing.assert_array_equal(slot.read()[[0, 2]], 0)


def test_one_session_serves_bindings_of_several_sizes_alive_at_once(tmp_path: Path) -> None:
    session = open_part(tmp_path, DOUBLE)
    bound = {}
    for rows in (1, 5, 2):
        y = BACKEND.allocate((rows, WIDTH), DType.FLOAT32)
        bound[rows] = y, session.bind({"x": filled(rows, WIDTH, start=rows), "y": y})
    for rows in (5, 1, 2, 5, 1):
        bound[rows][1].run()
    for rows, (y, _) in bound.items():
        np.testing.assert_array_equal(y.read(), 2 * numbers(rows, WIDTH, start=rows))


def test_a_launch_keeps_its_buffers_alive(tmp_path: Path) -> None:
    y = BACKEND.allocate((64, WIDTH), DType.FLOAT32)
    launch = open_part(tmp_path, DOUBLE).bind({"x": filled(64, WIDTH), "y": y})
    gc.collect()
    _others = [filled(64, WIDTH, start=-9) for _ in range(50)]  # would take freed memory
    launch.run()
    np.testing.assert_array_equal(y.read(), 2 * numbers(64, WIDTH))


def test_launches_count_what_really_ran(tmp_path: Path) -> None:
    body = "i = Cast <to = 7> (x) flat = Reshape (i, minus) y = Gather <axis = 0> (x, flat)"
    spec = part_spec("block_07", inputs=(tensor("x", "rows"),), outputs=(tensor("y", "rows"),))
    session = open_part(tmp_path, f"minus = Constant <value_ints = [-1]> () {body}", spec)
    x, y = BACKEND.allocate((2,), DType.FLOAT32), BACKEND.allocate((2,), DType.FLOAT32)
    launch = session.bind({"x": x, "y": y})
    assert session.launches == 0
    launch.run()
    assert session.launches == 1
    x.write(np.array([0, 1000], np.float32))  # gathers row 1000 of two
    with pytest.raises(EngineError, match="block_07: the engine failed while running"):
        launch.run()
    assert session.launches == 1


def test_what_fails_is_told_by_the_exception_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    launch = open_part(tmp_path, "s = Constant <value_ints = [7, 7]> () y = Reshape (x, s)").bind(
        {"x": filled(2, WIDTH), "y": filled(2, WIDTH)}
    )
    with pytest.raises(EngineError):
        launch.run()
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(EngineError):
        BACKEND.open(Artefact(path=tmp_path / "empty.onnx"), part_spec())
    assert capfd.readouterr() == ("", "")


def test_an_output_of_another_size_than_its_buffer_is_an_error(tmp_path: Path) -> None:
    spec = part_spec("odd", outputs=(tensor("y", "rows", WIDTH),))
    session = open_part(tmp_path, "y = Concat <axis = 0> (x, x)", spec)  # the file calls 2·rows rows
    with pytest.raises(EngineError, match="odd: "):
        session.bind({"x": filled(2, WIDTH), "y": filled(2, WIDTH)}).run()


def test_a_buffer_that_does_not_fit_is_refused_before_the_engine_sees_it(tmp_path: Path) -> None:
    session = open_part(tmp_path, DOUBLE)
    with pytest.raises(EngineError, match=r"part, tensor y: .* rows is 2"):
        session.bind({"x": filled(2, WIDTH), "y": filled(3, WIDTH)})


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    session = open_part(tmp_path, DOUBLE)
    launch = session.bind({"x": filled(1, WIDTH), "y": filled(1, WIDTH)})
    session.close()
    for use in (launch.run, lambda: session.bind({"x": filled(1, WIDTH), "y": filled(1, WIDTH)})):
        with pytest.raises(EngineError, match="the session is closed"):
            use()


def test_build_returns_the_onnx_file_and_writes_nothing(tmp_path: Path) -> None:
    path = write_part(tmp_path, DOUBLE, part_spec())
    artefacts = tmp_path / "engines"
    artefacts.mkdir()
    assert BACKEND.build(path, part_spec(), artefacts) == Artefact(path=path)
    assert list(artefacts.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_a_corrupt_file_is_an_engine_error(tmp_path: Path, damage: str) -> None:
    path = write_part(tmp_path, DOUBLE, part_spec("block_02"))
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\xff" * 64, "empty": b""}[damage])
    for use in (
        lambda: BACKEND.open(Artefact(path=path), part_spec("block_02")),
        lambda: BACKEND.build(path, part_spec("block_02"), tmp_path),
    ):
        with pytest.raises(EngineError, match="block_02"):
            use()


def test_a_missing_file_and_an_unknown_op_are_engine_errors(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"there is no file .*nowhere.onnx"):
        BACKEND.open(Artefact(path=tmp_path / "nowhere.onnx"), part_spec())
    path = write_part(tmp_path, "y = NoSuchOp (x)", part_spec("block_05"))
    with pytest.raises(EngineError, match=r"block_05: ONNX Runtime .* can't open .*NoSuchOp"):
        BACKEND.open(Artefact(path=path), part_spec("block_05"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (part_spec(inputs=(tensor("z"),)), "inputs of the ONNX file are x, its spec says z"),
        (part_spec(inputs=(tensor("x", "rows", 5),)), r"input x of the ONNX file is tensor\(float\)"),
        (part_spec(inputs=(tensor("x", "rows"),)), "input x of the ONNX file"),
        (part_spec(outputs=(tensor("y", "rows", WIDTH, dtype=DType.FLOAT16),)), "output y .* its spec says float16"),
    ],
)
def test_a_file_that_is_not_what_its_spec_says_is_refused(tmp_path: Path, spec: PartSpec, message: str) -> None:
    path = write_part(tmp_path, DOUBLE, part_spec())
    with pytest.raises(EngineError, match=message):
        BACKEND.open(Artefact(path=path), spec)


def test_a_path_need_not_be_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"parts\xff")
    folder.mkdir()
    path = write_part(tmp_path, DOUBLE, part_spec()).rename(folder / os.fsdecode(b"\xfe.onnx"))
    BACKEND.open(Artefact(path=path), part_spec()).close()


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(EngineError, match="got -1"):
        OnnxRuntimeBackend(threads=-1)
