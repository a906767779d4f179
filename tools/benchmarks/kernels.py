"""The CUDA kernels on a GPU: against the NumPy oracle, then their bandwidth against a device copy's.

    python tools/benchmarks/kernels.py [--check-only] [--batches 1,8,16] [--rounds 30] [--json FILE]
    compute-sanitizer --error-exitcode 1 python tools/benchmarks/kernels.py --check-only

The check takes every kernel, precision and odd shape, also at addresses that aren't 16-byte aligned, and each twice:
results must match the oracle and be the same bits again. The measurement is at DiT-XL/2's size (256 tokens of 1152),
with guidance. A kernel's runs take turns with copies that move as many bytes; both are graphs of launches over enough
sets of tensors that no cache holds them. Bytes are counted once each, as a perfect kernel would move them: a part's
inputs (of the modulation only the gates that it uses) and outputs; a copy reads half and writes half.

Exits 2 where there is no GPU, 1 where a result is wrong. It never ran on a GPU: there was none. Check and measurement
ran on the stand-in for NVIDIA's driver (tests/engines/stand_in_driver), whose kernels run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np

from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.core.latents import LatentSpec
from adacorr_deploy.core.specs import ConditionSpec, DType, ModelSpec, PartSpec
from adacorr_deploy.engines.cuda_core import CudaStream
from adacorr_deploy.engines.device import Device
from adacorr_deploy.engines.device_launch import DeviceLaunch
from adacorr_deploy.engines.device_memory import DeviceBuffer
from adacorr_deploy.engines.kernel_session import KernelLibrary
from adacorr_deploy.plugins import oracle, service_part_specs
from adacorr_deploy.plugins.kernel_compiler import compile_kernels
from adacorr_deploy.plugins.kernels import kernel_of_part, noise_spec

Array = Any  # of several dtypes
Arrays = Mapping[str, Array]
Sizes = Mapping[str, int]

PRECISIONS: Final = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
ROUNDING: Final = {DType.FLOAT32: 2.0**-23, DType.FLOAT16: 2.0**-11, DType.BFLOAT16: 2.0**-8}
ODD_SHAPES: Final = (
    (3, 1, 1),
    (2, 3, 7),
    (2, 3, 8),
    (3, 255, 100),
    (2, 257, 144),
    (2, 256, 1152),
)  # rows, tokens, width
MEASURED: Final = ("signals", "predict_1", "predict_2", "predict_3", "blend_2", "combine_1", "modulated", "probe")
STEPS: Final = 5
THRESHOLDS: Final = (0.1, 0.3, 1.0)  # an estimate of 0.2 mixes half and half: both sides are read
CACHES_BYTES: Final = 512 << 20  # more than any GPU's
LAUNCHES: Final = 200  # in a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How far a kernel's result was from the oracle's, in units of what is allowed; above 1 it is wrong."""

    part: str
    precision: str
    shape: tuple[int, ...]
    aligned: bool
    error: float
    repeats: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    part: str
    precision: str
    batch: int
    megabytes: float
    microseconds: float
    gigabytes_per_second: float
    copy_gigabytes_per_second: float
    share_of_copy: float


def main() -> int:
    """Run the command."""
    options = _options()
    try:
        with Device.open() as device:
            return _run(device, options)
    except AdaCorrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check-only", action="store_true", help="don't measure")
    parser.add_argument("--batches", type=_batches, default=(1, 8, 16), help="images, as 1,8,16")
    parser.add_argument("--rounds", type=int, default=30, help="turns of kernel and copy")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    return parser.parse_args()


def _batches(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _run(device: Device, options: argparse.Namespace) -> int:
    machine = {"gpu": device.name, "capability": device.compute_capability, "driver": device.driver_version}
    print(", ".join(machine.values()))
    library = KernelLibrary(device, compile_kernels())
    checks = list(_checks(device, library))
    wrong = [check for check in checks if not (check.error <= 1 and check.repeats)]
    print(f"{len(checks)} checks, {len(wrong)} wrong")
    for check in wrong:
        print(f"  {check}")
    speeds: list[Speed] = []
    if not options.check_only:
        _print_header()
        for speed in _speeds(device, library, options.batches, options.rounds):
            speeds.append(speed)
            _print_row(speed)
    if options.json:
        results = {"machine": machine, "checks": list(map(asdict, checks)), "speeds": list(map(asdict, speeds))}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if wrong else 0


# --- Right? ----------------------------------------------------------------------------------------------------------


def _checks(device: Device, library: KernelLibrary) -> Iterator[Check]:
    for precision, (rows, tokens, width) in product(PRECISIONS, ODD_SHAPES):
        model = _model(precision, tokens, width, channels=1 + width % 4, patch=1)
        for spec, aligned in product((*service_part_specs(model).values(), noise_spec(model)), (True, False)):
            yield _checked(library, spec, precision, {"rows": rows, "batch": rows, "steps": STEPS}, aligned)


def _model(precision: DType, tokens: int, width: int, *, channels: int = 4, patch: int = 2) -> ModelSpec:
    return ModelSpec(
        family="dit",
        precision=precision,
        latents=LatentSpec(shape=(channels, patch * tokens, patch), patch=(patch, patch)),
        width=width,
        conditions=ConditionSpec(num_classes=1000),
        blocks=(("attention", "mlp"), ("mlp",), ("attention", "mlp") * 2),
        units=(2, 1, 4),
        learned_variance=True,
    )


def _checked(library: KernelLibrary, spec: PartSpec, precision: DType, sizes: Sizes, aligned: bool) -> Check:
    inputs = _inputs(spec, sizes)
    buffers = _filled(library.device, spec, sizes, inputs, aligned)
    launch = library.open(spec).bind(buffers)
    found: list[dict[str, Array]] = []
    for _ in range(2):
        launch.run()
        found.append({tensor.name: buffers[tensor.name].read() for tensor in spec.outputs})
    kernel = kernel_of_part(spec.name)
    if kernel is None:
        raise AdaCorrError(f"{spec.name} has no kernel.")
    wide = {name: values if values.dtype == np.int64 else values.astype(np.float32) for name, values in inputs.items()}
    expected = ORACLES[kernel.name](wide, spec.outputs[0].resolved(sizes))
    rounding = ROUNDING[precision if kernel.typed else DType.FLOAT32]
    return Check(
        part=spec.name,
        precision=precision.value,
        shape=next(iter(inputs.values())).shape,
        aligned=aligned,
        error=max(_error(found[0][name], expected[name], rounding) for name in expected),
        repeats=all(found[0][name].tobytes() == found[1][name].tobytes() for name in expected),
    )


def _inputs(spec: PartSpec, sizes: Sizes) -> dict[str, Array]:
    random = np.random.default_rng(len(spec.name))
    arrays: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tensor.resolved(sizes)
        if tensor.dtype is DType.INT64:
            arrays[tensor.name] = random.integers(0, sizes["steps"], shape)
        else:
            arrays[tensor.name] = random.standard_normal(shape).astype(np.float32).astype(tensor.dtype.numpy)
    if "estimate" in arrays:
        estimates = np.resize([0.2, 0.0, 0.15, np.nan, 9.0], arrays["estimate"].shape)
        arrays.update(estimate=estimates.astype(np.float32), thresholds=np.array(THRESHOLDS, np.float32))
    return arrays


def _filled(device: Device, spec: PartSpec, sizes: Sizes, inputs: Arrays, aligned: bool) -> dict[str, DeviceBuffer]:
    """Return a part's buffers with its inputs written; unaligned ones begin one row into their memory."""
    buffers: dict[str, DeviceBuffer] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        first, *rest = tensor.resolved(sizes)
        memory = device.allocate((first + (not aligned), *rest), tensor.dtype)
        buffers[tensor.name] = memory if aligned else memory[1:]
        if tensor.name in inputs:
            buffers[tensor.name].write(inputs[tensor.name])
    return buffers


def _error(found: Array, expected: Array, rounding: float) -> float:
    """Return the largest difference in units of a rounding and a few float32 steps of terms of up to 100."""
    allowed = rounding * np.abs(expected) + 2e-5 + 1e-4 * np.abs(expected) * (rounding < 1e-6)
    return float(np.max(np.abs(found.astype(np.float64) - expected) / allowed))


def _extrapolate(inputs: Arrays, _: tuple[int, ...]) -> dict[str, Array]:
    row = inputs["coefficients"][int(inputs["step"][0])]
    named = {name: inputs[name] for name in ("latents", "history", "factors", "noise", "carried")}
    outputs = ("latents_out", "model_output", "carried_out")
    return dict(zip(outputs, oracle.extrapolate(**named, sampler_row=row), strict=True))


def _noise(inputs: Arrays, shape: tuple[int, ...]) -> dict[str, Array]:
    _, *image = shape
    keys, draw = inputs["keys"].view(np.uint64).tolist(), int(inputs["draw"][0])
    noise = [oracle.philox_normals(seed, number, draw, math.prod(image)).reshape(image) for seed, number in keys]
    return {"noise": np.stack(noise)}


# By kernel: what its outputs should be, from its inputs as float32 and the shape of its first output.
ORACLES: Final[Mapping[str, Callable[[Arrays, tuple[int, ...]], dict[str, Array]]]] = {
    "signals": lambda inputs, _: {"signals": oracle.signals(**inputs)},
    "predict": lambda inputs, _: {"tokens_out": oracle.predict(**inputs)},
    "blend": lambda inputs, _: dict(zip(("tokens_out", "weight"), oracle.blend(**inputs), strict=True)),
    "combine": lambda inputs, _: {"tokens_out": oracle.combine(**inputs)},
    "modulated": lambda inputs, _: {"tokens_out": oracle.modulated(**inputs)},
    "probe": lambda inputs, _: {"probe": oracle.probe(**inputs)},
    "extrapolate": _extrapolate,
    "output_error": lambda inputs, _: {"error": oracle.output_error(**inputs)},
    "philox_normal": _noise,
}


# --- Fast? -----------------------------------------------------------------------------------------------------------


def _speeds(device: Device, library: KernelLibrary, batches: Sequence[int], rounds: int) -> Iterator[Speed]:
    for precision, batch, part in product(PRECISIONS, batches, MEASURED):
        spec = service_part_specs(_model(precision, 256, 1152))[part]
        sizes = {"rows": 2 * batch, "batch": batch, "steps": STEPS}
        moved = _moved_bytes(spec, sizes)
        sets = max(2, min(LAUNCHES, math.ceil(CACHES_BYTES / moved)))
        graphs = [
            _graph(device, _kernel_launches(library, spec, sizes, sets)),
            _graph(device, _copy_launches(device, moved // 2, sets)),
        ]
        seconds, copy_seconds = _in_turns(device, graphs, rounds)
        yield Speed(
            part=part,
            precision=precision.value,
            batch=batch,
            megabytes=moved / 1e6,
            microseconds=seconds * 1e6,
            gigabytes_per_second=moved / seconds / 1e9,
            copy_gigabytes_per_second=moved / copy_seconds / 1e9,
            share_of_copy=copy_seconds / seconds,
        )


def _moved_bytes(spec: PartSpec, sizes: Sizes) -> int:
    shapes = {tensor.name: tensor.resolved(sizes) for tensor in (*spec.inputs, *spec.outputs)}
    if "modulation" in shapes:  # of which only the gates of each evaluation and unit, or a shift and a scale, are read
        _, rows, _, width = shapes["modulation"]
        count = math.prod(shapes["history"][:2]) if "history" in shapes else 2
        shapes["modulation"] = (count, rows, width)
    types = {tensor.name: tensor.dtype.numpy.itemsize for tensor in (*spec.inputs, *spec.outputs)}
    return sum(math.prod(shape) * types[name] for name, shape in shapes.items())


def _kernel_launches(library: KernelLibrary, spec: PartSpec, sizes: Sizes, sets: int) -> list[DeviceLaunch]:
    inputs = _inputs(spec, sizes)
    if "estimate" in inputs:
        inputs["estimate"] = np.full_like(inputs["estimate"], 0.2)
    session, first = library.open(spec), _filled(library.device, spec, sizes, inputs, aligned=True)
    launches = [session.bind(first)]
    for _ in range(sets - 1):
        buffers = _filled(library.device, spec, sizes, {}, aligned=True)
        for name in inputs:
            buffers[name].copy_from(first[name])
        launches.append(session.bind(buffers))
    return launches


def _copy_launches(device: Device, count_bytes: int, sets: int) -> list[DeviceLaunch]:
    launches = []
    for _ in range(sets):
        source, target = (device.allocate((count_bytes // 4,), DType.FLOAT32) for _ in range(2))
        launches.append(_copy_launch(device, source, target))
    return launches


def _copy_launch(device: Device, source: DeviceBuffer, target: DeviceBuffer) -> DeviceLaunch:
    def enqueue(stream: CudaStream) -> None:
        device.cuda.call("cuMemcpyAsync", target.address, source.address, source.size_bytes, stream.handle)

    return DeviceLaunch(device, "copy", enqueue, on_run=lambda: None, keeps=(source, target), own_graph=False)


def _graph(device: Device, launches: Sequence[DeviceLaunch]) -> DeviceLaunch:
    """Return a graph of many launches, one set of tensors after the other, warmed up."""
    for launch in launches:
        launch.run()
    graph = device.fuse([launches[index % len(launches)] for index in range(LAUNCHES)])
    if graph is None:
        raise AdaCorrError("The launches can't be captured in a graph. Update the driver.")
    graph.run()
    device.synchronize()
    return graph


def _in_turns(device: Device, graphs: Sequence[DeviceLaunch], rounds: int) -> list[float]:
    """Return the median seconds of a launch in each graph; they take turns, so that a drift touches all alike."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, kept in zip(graphs, times, strict=True):
            start = time.perf_counter()
            graph.run()
            device.synchronize()
            kept.append((time.perf_counter() - start) / LAUNCHES)
    return [statistics.median(kept) for kept in times]


def _print_header() -> None:
    print(f"{'part':<12} {'precision':<9} {'batch':>5} {'MB':>8} {'µs':>8} {'GB/s':>7} {'copy GB/s':>9} {'of copy':>7}")


def _print_row(speed: Speed) -> None:
    print(
        f"{speed.part:<12} {speed.precision:<9} {speed.batch:>5} {speed.megabytes:>8.2f} {speed.microseconds:>8.1f} "
        f"{speed.gigabytes_per_second:>7.0f} {speed.copy_gigabytes_per_second:>9.0f} {speed.share_of_copy:>7.0%}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
