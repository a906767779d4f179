"""No address reaches an engine unless names, dtypes, shapes and axis sizes fit and outputs stand alone."""

from __future__ import annotations

import pytest

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType
from adacorr_deploy.engines.binding import check_binding
from adacorr_deploy.engines.host_memory import HostBuffer
from tests.engines.onnx_graphs import part_spec, tensor

SPEC = part_spec(
    "block_03",
    inputs=(tensor("x", "rows", 4), tensor("step", 1, dtype=DType.INT64)),
    outputs=(tensor("y", "rows", 4),),
)


def buffers(**changed: HostBuffer) -> dict[str, HostBuffer]:
    fitting = {
        "x": HostBuffer.allocate((3, 4), DType.FLOAT32),
        "step": HostBuffer.allocate((1,), DType.INT64),
        "y": HostBuffer.allocate((3, 4), DType.FLOAT32),
    }
    return fitting | changed


def test_fitting_buffers_give_the_sizes_of_the_named_axes() -> None:
    assert check_binding(SPEC, buffers()) == {"rows": 3}


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("x", (3, 4), DType.FLOAT16, r"block_03, tensor x: the buffer holds float16, the engine takes float32"),
        ("x", (3, 4, 1), DType.FLOAT32, r"tensor x: the buffer's shape is \(3, 4, 1\), the engine takes \(rows, 4\)"),
        ("x", (3, 5), DType.FLOAT32, r"tensor x: the buffer's shape is \(3, 5\), the engine takes \(rows, 4\)"),
        ("step", (2,), DType.INT64, r"tensor step: the buffer's shape is \(2,\), the engine takes \(1\)"),
        ("y", (2, 4), DType.FLOAT32, r"tensor y: .* \(rows, 4\); rows is 3 in the tensors before it"),
        ("z", (3, 4), DType.FLOAT32, r"block_03: no tensor called z. Its tensors are step, x, y"),
    ],
)
def test_a_buffer_that_does_not_fit_is_named(name: str, shape: tuple[int, ...], dtype: DType, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_binding(SPEC, buffers(**{name: HostBuffer.allocate(shape, dtype)}))


def test_a_missing_buffer_is_named() -> None:
    with pytest.raises(EngineError, match="block_03: no buffer for step, y"):
        check_binding(SPEC, {"x": HostBuffer.allocate((3, 4), DType.FLOAT32)})


def test_an_output_over_another_tensors_memory_is_refused_and_its_neighbour_is_not() -> None:
    memory = HostBuffer.allocate((6, 4), DType.FLOAT32)
    with pytest.raises(EngineError, match="output y shares memory with x"):
        check_binding(SPEC, buffers(x=memory[0:3], y=memory[2:5]))
    assert check_binding(SPEC, buffers(x=memory[0:3], y=memory[3:6])) == {"rows": 3}


def test_two_inputs_may_share_memory() -> None:
    spec = part_spec(inputs=(tensor("a"), tensor("b")))
    shared = HostBuffer.allocate((3, 4), DType.FLOAT32)
    assert check_binding(spec, {"a": shared, "b": shared, "y": buffers()["y"]}) == {"rows": 3}
