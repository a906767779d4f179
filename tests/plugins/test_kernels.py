"""The table of CUDA kernels follows the service parts' tensors, and its launches cover them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adacorr_deploy.core.errors import EngineError
from adacorr_deploy.core.specs import DType, PartSpec
from adacorr_deploy.plugins import service_part_specs
from adacorr_deploy.plugins.kernels import ELEMENT_BYTES, KERNELS, NOISE_KERNEL, kernel_launch, kernel_of_part
from tests.plugins.service_models import model_spec

DIT_XL = model_spec(tokens=256, width=1152, units=(2, 8), precision=DType.FLOAT16)
PARTS = service_part_specs(DIT_XL)


def shapes_of(spec: PartSpec, **axes: int) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.resolved(axes) for tensor in (*spec.inputs, *spec.outputs)}


@pytest.mark.parametrize("part", PARTS)
def test_every_service_part_has_a_kernel_that_takes_its_tensors_in_its_order(part: str) -> None:
    kernel = kernel_of_part(part)
    assert kernel is not None
    assert kernel.inputs == tuple(tensor.name for tensor in PARTS[part].inputs)
    assert kernel.outputs == tuple(tensor.name for tensor in PARTS[part].outputs)
    tokens = {tensor.dtype for tensor in (*PARTS[part].inputs, *PARTS[part].outputs)} - {DType.INT64, DType.FLOAT32}
    assert kernel.typed == bool(tokens)


@pytest.mark.parametrize("part", ["embed", "condition", "block_00", "head", "output", "decode"])
def test_parts_of_the_model_have_none(part: str) -> None:
    assert kernel_of_part(part) is None


def test_launches_at_dit_xl_size() -> None:
    """Batch 8 with guidance: enough blocks for every multiprocessor of the largest GPUs, several times over."""
    signals = kernel_launch(KERNELS["signals"], "float16", shapes_of(PARTS["signals"], rows=16))
    assert (signals.entry, signals.integers) == ("adacorr_signals_float16", (256, 1152))
    assert (signals.grid, signals.block, signals.scratch) == ((32, 16, 1), (256, 1, 1), (16, 257, 8))
    predict = kernel_launch(KERNELS["predict"], DType.BFLOAT16, shapes_of(PARTS["predict_2_u8"], rows=16, steps=50))
    assert (predict.entry, predict.integers) == ("adacorr_predict_bfloat16", (256, 1152, 2, 8))
    assert (predict.grid, predict.block, predict.scratch) == ((144, 16, 1), (128, 1, 1), None)
    blend = kernel_launch(KERNELS["blend"], "float32", shapes_of(PARTS["blend_3"], rows=16, steps=50))
    assert (blend.entry, blend.integers, blend.grid) == ("adacorr_blend_float32", (256, 1152, 3, 2), (288, 16, 1))
    extrapolate = kernel_launch(KERNELS["extrapolate"], "float16", shapes_of(PARTS["extrapolate_2"], batch=8, steps=50))
    assert (extrapolate.entry, extrapolate.integers, extrapolate.grid) == ("adacorr_extrapolate", (256, 2), (1, 8, 1))
    error = kernel_launch(KERNELS["output_error"], "float16", shapes_of(PARTS["output_error"], batch=8))
    assert (error.entry, error.integers, error.grid) == ("adacorr_output_error", (256,), (1, 8, 1))
    noise = kernel_launch(KERNELS[NOISE_KERNEL], "float32", {"keys": (8, 2), "draw": (1,), "noise": (8, 4, 32, 32)})
    assert (noise.entry, noise.integers, noise.grid) == ("adacorr_philox_normal", (4096,), (8, 8, 1))


@pytest.mark.parametrize("name", KERNELS)
def test_there_is_a_kernel_for_each_precision_of_tokens_and_no_other(name: str) -> None:
    entries = [KERNELS[name].entry(precision) for precision in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)]
    stem = f"adacorr_{name}"
    assert entries == ([f"{stem}_{precision}" for precision in ELEMENT_BYTES] if KERNELS[name].typed else [stem] * 3)
    for precision in (DType.INT64, "int8"):
        with pytest.raises(EngineError, match="there are float32, float16, bfloat16"):
            KERNELS[name].entry(precision)


@pytest.mark.parametrize("rows", [0, 65536])
def test_more_rows_than_a_grid_has_are_refused(rows: int) -> None:
    shapes = shapes_of(PARTS["signals"], rows=rows)
    with pytest.raises(EngineError, match=r"allowed are 1 … 65535 rows .* Take a smaller batch\."):
        kernel_launch(KERNELS["signals"], "float16", shapes)


def test_a_row_too_long_for_32_bit_counters_is_refused() -> None:
    with pytest.raises(EngineError, match=r"1 rows of 2147483648 elements"):
        kernel_launch(KERNELS["output_error"], "float32", {"predicted": (1, 2, 2**15, 2**15), "error": (1,)})


def test_the_table_loads_nothing_of_cuda() -> None:
    code = "import sys, adacorr_deploy.plugins.kernels; sys.exit('cuda' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
