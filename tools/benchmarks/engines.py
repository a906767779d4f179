"""The engines on a GPU: one table of PyTorch, torch.compile, one graph, per-block engines, graphs, and reuse.

    python tools/benchmarks/engines.py [--json build/engines.json] [--size XL/2,S/2] [--precision fp16,bf16]
                                       [--batch 1,4,16] [--backend onnxruntime-cuda,tensorrt-rtx,tensorrt] …
    python tools/benchmarks/engines.py --show [--json build/engines.json]
    python tools/benchmarks/engines.py --device cpu --backend onnxruntime --size tiny --precision fp32 --steps 6

It was NOT RUN ON A GPU YET: there was none. Its logic ran on a CPU, with ONNX Runtime and a tiny model (the last
command), and over the stand-in for NVIDIA's driver (tests/tools/test_engine_benchmark.py).

A row is whole requests: inputs written, all steps with guidance, latents read, by the host's clock, with everything on
the GPU finished before and after. All rows of a model, precision and batch take turns in one process, after two runs
each that warm up; shown is the median of the rounds. Reuse is forced by a static schedule: `one by one` predicts each
block (gated-taylor), `all at once` the whole step (output-taylor); without reuse they are a graph per block, and one of
all blocks. PyTorch runs diffusers' model, with guidance and the DDIM update around it. Weights are random, with gates
that are not zero. The error is that of the final latents, against PyTorch in float32.

The JSON file keeps the rows of each model, precision and batch when they are done, by hardware and versions. What is
there is not measured again: interrupt the command and give it again, also with other options. A row that failed keeps
its reason; --retry takes it again. If the GPU's memory is short, name one backend at a time.

Exits 2 where there is no GPU. Whether a goal is met stands in the table; it doesn't change the exit code.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Final

from engine_jobs import Job, rows_of_job
from engine_rows import PRECISIONS, Arm, Case, Results, arms
from engine_table import table
from machine import cpu_model, say
from sizes import shape_and_patch

from adacorr_deploy.core.errors import AdaCorrError
from adacorr_deploy.engines import BACKENDS
from adacorr_deploy.engines.device import Device

GPU_BACKENDS: Final = ("onnxruntime-cuda", "tensorrt-rtx", "tensorrt")
PACKAGES: Final = (
    "adacorr-deploy",
    "cuda-bindings",
    "cuda-core",
    "diffusers",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "triton",
)


def main() -> int:
    """Run the command."""
    options = _options()
    try:
        return _show(options) if options.show else _run(options)
    except AdaCorrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {options.json} keeps what was done; the same command goes on", file=sys.stderr)
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--size", type=_words(), default=("XL/2", "S/2"), help="DiT sizes with their patch, or tiny (default: XL/2,S/2)"
    )
    add("--precision", type=_words(PRECISIONS), default=("fp16", "bf16"), help="(default: fp16,bf16)")
    add("--batch", type=_numbers(int), default=(1, 4, 16), help="images; rows are twice as many (default: 1,4,16)")
    add("--steps", type=int, default=50, help="of a request (default: %(default)s)")
    add(
        "--rho", type=_numbers(float), default=(0.3, 0.5, 0.7), help="shares of launches to skip (default: 0.3,0.5,0.7)"
    )
    add("--backend", type=_words(BACKENDS), default=GPU_BACKENDS, help=f"(default: {','.join(GPU_BACKENDS)})")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="of PyTorch, and what must be here (default: cuda)")
    add("--rows", type=_words(), default=("*",), help="only rows like these, as 'PyTorch*,*monolith*' (default: all)")
    add(
        "--profile",
        type=_numbers(int),
        default=(1, 8, 16),
        help="batches of compiled engines: min,opt,max (default: 1,8,16)",
    )
    add("--rounds", type=int, default=5, help="turns of every row (default: %(default)s)")
    add("--json", type=Path, default=Path("build/engines.json"), help="what keeps the rows (default: %(default)s)")
    add("--keep", type=Path, help="leave ONNX files and engines here for later runs of the same code (10 GB)")
    add("--retry", action="store_true", help="measure again what failed")
    add("--show", action="store_true", help="only print the tables of the JSON file, of whatever machine")
    options = parser.parse_args()
    if min(*options.batch, options.steps, options.rounds) < 1 or not all(0 < rho < 1 for rho in options.rho):
        parser.error("--batch, --steps and --rounds are at least 1, --rho lies between 0 and 1")
    if len(options.profile) != 3 or list(options.profile) != sorted(options.profile):
        parser.error("--profile is three batches: the smallest, the one to tune for, the largest")
    return options


def _words(known: Collection[str] = ()) -> Callable[[str], tuple[str, ...]]:
    def words(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if known and (unknown := [word for word in found if word not in known]):
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not known; known are {', '.join(known)}")
        return found

    return words


def _numbers(kind: type[int] | type[float]) -> Callable[[str], tuple[float, ...]]:
    def numbers(text: str) -> tuple[float, ...]:
        try:
            return tuple(kind(word) for word in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error

    return numbers


def _run(options: argparse.Namespace) -> int:
    results = Results(options.json)
    kept = results.of(machine(options.device))
    for size in options.size:
        shape_and_patch(size)
    print(_words_of(kept.machine), flush=True)
    wanted = [
        arm for arm in arms(options.backend, options.rho) if any(fnmatch(str(arm), like) for like in options.rows)
    ]
    with tempfile.TemporaryDirectory() if options.keep is None else nullcontext(options.keep.resolve()) as folder:
        for size, precision in product(options.size, options.precision):
            files = Path(folder) / f"{size.replace('/', '-')}-{precision}"
            files.mkdir(parents=True, exist_ok=True)
            for batch in options.batch:
                case = Case(size=size, precision=precision, batch=batch, steps=options.steps, profile=options.profile)
                left = kept.left(case, wanted, retry=options.retry)
                say(f"{case}: {len(left)} rows to measure of {len(wanted)}")
                if left:
                    kept.put(rows_of_job(_job(case, left, files, options)))
                    results.save()
            if options.keep is None:  # the next model's take as much again
                shutil.rmtree(files)
    print("\n".join(table(kept.rows)))
    return 0


def _job(case: Case, left: Sequence[Arm], files: Path, options: argparse.Namespace) -> Job:
    return Job(
        case=case,
        arms=tuple(left),
        device=options.device,
        rounds=options.rounds,
        folder=files,
        journal=files / "journal.jsonl",
    )


def _show(options: argparse.Namespace) -> int:
    for each in Results(options.json).machines:
        print(_words_of(each.machine))
        print("\n".join(table(each.rows)), end="\n\n")
    return 0


# --- The machine -----------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    """Return what rows must have in common to stand in one table.

    Raises:
        BackendUnavailableError: If there is no GPU, and it is not about the CPU.
    """
    versions = {"python": platform.python_version(), **dict(_versions())}
    if device == "cpu":
        return {"cpu": cpu_model(), "cores": str(len(os.sched_getaffinity(0))), **versions}
    with Device.open() as gpu:
        found = {"gpu": gpu.name, "capability": gpu.compute_capability, "cuda": gpu.driver_version}
    return {**found, "driver": _driver(), **versions}


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _words_of(words: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in words.items())


if __name__ == "__main__":
    sys.exit(main())
