"""Peak resident memory of sampling, against the arithmetic: weights once, activations, buffers, slots.

    python tools/benchmarks/memory.py BUNDLE [--batch 8] [--steps 10] [--guidance 4] [--json]

Each policy runs in a fresh process, which reports what it holds after its imports (the baseline: Python, NumPy and ONNX
Runtime's code) and its peak. Every other term is computed from the bundle's manifest, the headers of its weight files
and its graphs, and printed with its formula; letters as in core/shapes.py, p = bytes of a number in the model's
precision. A bundle of a random model is left by tools/benchmarks/chain.py --keep BUNDLE.

Activations are what one engine needs inside while it runs: the most bytes of intermediate tensors alive at once, over
the parts that the policy runs, in the graph's own order; ONNX Runtime fuses some of them away.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from adacorr_deploy.caching.calibration import Calibration, CalibrationKey, Probe
from adacorr_deploy.caching.controllers import Run, StaticController, controller_for_policy
from adacorr_deploy.caching.decisions import Controller
from adacorr_deploy.caching.policy import PRESETS
from adacorr_deploy.core.bundle import Bundle, open_bundle
from adacorr_deploy.core.manifest import Manifest
from adacorr_deploy.core.sampler_rows import COLUMNS
from adacorr_deploy.core.shapes import BATCH, BRANCHES, ROWS, SIZE_AXES, STEPS
from adacorr_deploy.core.specs import MODULATIONS_PER_UNIT, DType, ModelSpec
from adacorr_deploy.engines.host_memory import HostBuffer
from adacorr_deploy.engines.onnxruntime_cpu import OnnxRuntimeBackend
from adacorr_deploy.plugins.service_parts import SIGNAL_COUNT
from adacorr_deploy.runtime import Pipeline, SampleRequest
from adacorr_deploy.runtime.buffers import MAX_HISTORY, RunSize

if TYPE_CHECKING:
    import onnx

POLICIES: Final = ("none", "robust", "blocks")  # blocks: every second step predicted block by block, gated-taylor
_SERVICES: Final[Mapping[str, tuple[str, ...]]] = {  # service parts that each runs
    "none": (),
    "robust": ("signals", "extrapolate_2", "output_error"),
    "blocks": ("predict_2",),
}
PREDICTED: Final = 3  # skipped steps that the made-up calibration speaks of


# --- The measured process --------------------------------------------------------------------------------------------


class CountingBackend(OnnxRuntimeBackend):
    """Adds up what the runtime allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated_bytes = 0

    def allocate(self, shape: tuple[int, ...], dtype: DType) -> HostBuffer:
        self.allocated_bytes += math.prod(shape) * dtype.numpy.itemsize
        return super().allocate(shape, dtype)


def resident_bytes(field: str) -> int:
    """Return a line of this process's status: VmRSS, or VmHWM, its peak (getrusage's would count the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: the kernel reports no {field} in /proc/self/status.")
    return int(found[1]) * 1024


def measured(path: Path, policy: str, request: SampleRequest) -> dict[str, int]:
    """Sample once in this process, which has done nothing else, and return its memory in bytes."""
    baseline, backend = resident_bytes("VmRSS"), CountingBackend()
    with Pipeline.open(path, backend=backend) as pipeline:
        opened = resident_bytes("VmHWM")
        controller, history = controller_of(policy, pipeline.manifest, request)
        pipeline.sample(request, controller, history=history)
    return {
        "baseline": baseline,
        "peak_when_opened": opened,
        "peak": resident_bytes("VmHWM"),
        "allocated": backend.allocated_bytes,
    }


def controller_of(policy: str, manifest: Manifest, request: SampleRequest) -> tuple[Controller, int]:
    """Return a controller and the evaluations that its slots keep. What it decides changes no buffer."""
    run = Run(steps=request.steps, blocks=len(manifest.model.units))
    if policy == "none":
        return controller_for_policy(PRESETS["none"], run, None), 0
    if policy == "robust":
        robust = PRESETS["robust"]
        return controller_for_policy(robust, run, _calibration(manifest, request)), robust.predictor.history
    gated = PRESETS["scheduled-blocks"]
    evaluated = frozenset(range(0, request.steps, 2))
    return StaticController(gated, run, evaluated, "benchmark"), gated.predictor.history


def _calibration(manifest: Manifest, request: SampleRequest) -> Calibration:
    """Make up a calibration, so that any bundle can be measured: skipping k steps costs k²."""
    model, steps = manifest.model, request.steps
    costs = tuple(float(k * k) for k in range(1, PREDICTED + 1))
    return Calibration(
        key=CalibrationKey(
            checkpoint_sha256=manifest.checkpoint_sha256,
            sampler=request.sampler.value,
            steps=steps,
            guidance=request.guidance,
            latent_shape=model.latent_shape,
        ),
        predictor=PRESETS["robust"].predictor,
        images=1,
        skip_costs=((costs,) * PREDICTED,) * steps,
        probe=Probe(block=0, expected=(((0.1,) * PREDICTED,) * PREDICTED,) * steps, slope=1.0),
        offset_limits=((1.0,) * PREDICTED,) * steps,
        paper_floors=(1.0,) * len(model.units),
    )


def measured_in_a_process(args: argparse.Namespace, policy: str) -> dict[str, int]:
    """Run this script again for one policy.

    Raises:
        SystemExit: If it fails, with its last line.
    """
    options = [f"--{name}={getattr(args, name)}" for name in ("batch", "steps", "guidance")]
    command = [sys.executable, str(Path(__file__).resolve()), str(args.bundle.resolve()), *options, "--measure", policy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: policy {policy}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, int] = json.loads(done.stdout)
    return result


# --- The arithmetic --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    name: str
    formula: str
    size_bytes: int


def run_size(policy: str, request: SampleRequest) -> RunSize:
    """Return the sizes that `Pipeline.sample` leases for a policy."""
    history = {"none": (0, 0), "robust": (0, 3), "blocks": (2, 0)}[policy]
    return RunSize(
        batch=request.batch,
        branches=request.branches,
        steps=request.steps,
        history=history[0],
        output_history=history[1],
    )


def buffer_terms(model: ModelSpec, size: RunSize, references: int) -> list[Term]:
    """Return what the runtime allocates for a run; `references` block inputs are kept for signals."""
    p, S, R, B, K = model.precision.numpy.itemsize, size.steps, size.rows, size.batch, size.branches
    tokens = R * model.tokens * model.width * p
    units = sum(model.units if size.history else set(model.units))
    modulation = MODULATIONS_PER_UNIT * sum(model.units) + 2
    image = math.prod(model.latent_shape) * B * DType.FLOAT32.numpy.itemsize
    outputs = max(size.output_history, 1)
    slots = (
        f"{size.history}·{units}·R·N·D·p (T·U)" if size.history else f"{units}·R·N·D·p (one block's units: no cache)"
    )
    return [
        Term(name="tokens", formula="5·R·N·D·p (two between blocks, fresh, estimate, zeros)", size_bytes=5 * tokens),
        Term(
            name="modulations",
            formula=f"S·R·{modulation}·D·p (six a block, two of the head)",
            size_bytes=S * R * modulation * model.width * p,
        ),
        Term(
            name="images",
            formula=f"{11 + outputs}·B·C·H·W·4 (two latents, two carried, two kept, noise, two scratch, prediction, "
            f"zeros; {outputs} outputs)",
            size_bytes=(11 + outputs) * image,
        ),
        Term(name="slots", formula=slots, size_bytes=max(size.history, 1) * units * tokens),
        Term(name="references", formula=f"{references}·R·N·D·p", size_bytes=references * tokens),
        Term(name="scalars", formula="inputs, factors, signals: a few numbers each", size_bytes=_scalars(S, R, B, K)),
    ]


def _scalars(steps: int, rows: int, batch: int, branches: int) -> int:
    """Bytes of the buffers that hold a few numbers: 4 each, 8 for labels, steps and the keys of noise."""
    counts = sum(range(1, MAX_HISTORY + 1))  # of factors for 1 … MAX_HISTORY evaluations
    image = batch + counts + branches + branches * batch + steps + steps * len(COLUMNS) + len(SIZE_AXES)
    block = rows * SIGNAL_COUNT + (counts + 1) + 3 + 2 * rows
    return 4 * (image + block) + 8 * (rows + 1 + 2 * batch + 1 + counts + 1)


def weight_bytes(bundle: Bundle) -> int:
    """Return the bytes of all weights, as the headers of the safetensors files say."""
    return sum(tensor_bytes(bundle.file(name)) for name in bundle.manifest.files if name.endswith(".safetensors"))


def tensor_bytes(path: Path) -> int:
    """Return the bytes of a safetensors file's tensors, as its header says."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = (entry for name, entry in header.items() if name != "__metadata__")
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in tensors)


def activations(bundle: Bundle, policy: str, size: RunSize) -> tuple[str, int]:
    """Return the part that needs most inside while it runs, and the bytes."""
    names = ("embed", "condition", bundle.manifest.model.block_names[0], "head", *_SERVICES[policy])
    of_parts = {name: live_bytes(bundle.file(bundle.manifest.parts[name].onnx), size) for name in names}
    return max(of_parts.items(), key=lambda each: each[1])


def live_bytes(path: Path, size: RunSize) -> int:
    """Return the most bytes of intermediate tensors alive at once in a part; its inputs and outputs are bound."""
    import onnx
    from onnx import inliner, shape_inference

    model = inliner.inline_local_functions(onnx.load(str(path), load_external_data=False))
    _fix_axes(model, {BATCH: size.batch, BRANCHES: size.branches, ROWS: size.rows, STEPS: size.steps})
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    bound = {value.name for value in (*graph.input, *graph.output)}
    sizes = {value.name: _value_bytes(value) for value in graph.value_info if value.name not in bound}
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    live, peak = 0, 0
    for index, node in enumerate(graph.node):
        live += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, live)
        live -= sum(sizes.get(name, 0) for name in set(node.input) if last_use[name] == index)
    return peak


def _fix_axes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give named axes their sizes, and forget the shapes that were inferred without them."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _value_bytes(value: onnx.ValueInfoProto) -> int:
    from onnx import helper

    kind = value.type.tensor_type
    return math.prod(_dims(value)) * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize


def _dims(value: onnx.ValueInfoProto) -> Iterator[int]:
    for dim in value.type.tensor_type.shape.dim:
        if not dim.dim_value and dim.dim_param:
            raise SystemExit(f"error: ONNX infers no shape for {value.name}, so that activations can't be computed.")
        yield dim.dim_value


# --- The script ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A policy's memory in bytes.

    Attributes:
        baseline: Resident after the imports.
        peak_when_opened: Highest until all parts were open.
        peak: Highest until the end.
        allocated: What the runtime asked for, which the buffer terms must add up to.
        buffers: Sum of the buffer terms, tokens to scalars.
        arithmetic: Sum of all terms.
        ratio: (peak − baseline) ÷ arithmetic.
    """

    policy: str
    terms: list[Term]
    buffers: int
    allocated: int
    arithmetic: int
    baseline: int
    peak_when_opened: int
    peak: int
    ratio: float


def compared(args: argparse.Namespace, policy: str, request: SampleRequest) -> Row:
    """Measure a policy, and return its memory beside the arithmetic."""
    print(f"sampling with {policy}", file=sys.stderr, flush=True)
    bundle, size = open_bundle(args.bundle), run_size(policy, request)
    part, inside = activations(bundle, policy, size)
    buffers = buffer_terms(bundle.manifest.model, size, references=1 if policy == "robust" else 0)
    terms = [
        Term(name="weights", formula="once, from the safetensors headers", size_bytes=weight_bytes(bundle)),
        Term(name="activations", formula=f"most alive at once inside {part}", size_bytes=inside),
        *buffers,
    ]
    arithmetic, memory = sum(term.size_bytes for term in terms), measured_in_a_process(args, policy)
    return Row(
        policy=policy,
        terms=terms,
        buffers=sum(term.size_bytes for term in buffers),
        arithmetic=arithmetic,
        ratio=(memory["peak"] - memory["baseline"]) / arithmetic,
        **memory,
    )


def print_report(rows: list[Row]) -> None:
    for row in rows:
        print(f"\npolicy {row.policy}  (MB)")
        for term in row.terms:
            print(f"  {term.name:<18}{term.size_bytes / 1e6:>10.1f}   {term.formula}")
        for name, meaning in _MEANINGS.items():
            print(f"  {name:<18}{getattr(row, name) / 1e6:>10.1f}   {meaning}")
        print(f"  {'ratio':<18}{row.ratio:>10.3f}   (peak − baseline) ÷ arithmetic")


_MEANINGS: Final[Mapping[str, str]] = {
    "arithmetic": "sum of the above",
    "allocated": "what the runtime asked for: tokens to scalars",
    "baseline": "resident after the imports",
    "peak_when_opened": "highest until all parts were open",
    "peak": "highest until the end",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=4.0, help="1: one row an image (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--measure", choices=POLICIES, help=argparse.SUPPRESS)  # in the fresh process
    args = parser.parse_args()
    request = SampleRequest((0,) * args.batch, steps=args.steps, guidance=args.guidance)
    if args.measure:
        print(json.dumps(measured(args.bundle, args.measure, request)))
        return
    rows = [compared(args, policy, request) for policy in POLICIES]
    if args.json:
        options = {"batch": args.batch, "steps": args.steps, "guidance": args.guidance}
        print(json.dumps({**options, "rows": [asdict(row) for row in rows]}))
    else:
        print_report(rows)


if __name__ == "__main__":
    main()
