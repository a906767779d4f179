"""Peak resident memory of adacorr-build, beside the bytes of the weights that it reads and writes.

    python tools/benchmarks/build_memory.py [MODEL] [--backend onnxruntime] [--precision fp32] [--limit 2] [--json]

MODEL is what adacorr-build takes, or a random model of a size (DiT-XL/2, DiT-S/2, …, PixArt-XL, PixArt-tiny) that is
written to --folder first, as a pipeline in float32, and removed afterwards; full sizes take 6 GB there. The build runs
in a process of its own, which reports what it holds after its imports and its peak, mapped pages of files included.
Fails if the peak is above --limit times the smaller of the checkpoint's weights and the bundle's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import say
from memory import resident_bytes, tensor_bytes, weight_bytes
from models import write_random_pipeline

from adacorr_deploy.core.bundle import open_bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A build's memory, in bytes.

    Attributes:
        checkpoint: Of the transformer's weights, as the checkpoint stores them.
        bundle: Of all weights in the bundle's parts.
        baseline: Resident after the imports of adacorr-build.
        peak: The most that was resident.
        ratio: peak ÷ the smaller of the two.
    """

    model: str
    backend: str
    precision: str
    checkpoint: int
    bundle: int
    baseline: int
    peak: int
    ratio: float


def build_here(arguments: list[str]) -> dict[str, int]:
    """Build in this process, which has done nothing else.

    Raises:
        SystemExit: If the build fails.
    """
    from adacorr_deploy.cli.build import main
    from adacorr_deploy.exporters import bundle_builder  # noqa: F401  the command imports it only when it builds

    baseline = resident_bytes("VmRSS")
    try:
        main(arguments)
    except SystemExit as end:
        if end.code:
            raise
    return {"baseline": baseline, "peak": resident_bytes("VmHWM")}


def measured(model: Path, name: str, args: argparse.Namespace, folder: Path) -> Result:
    """Build in a fresh process, and return its memory.

    Raises:
        SystemExit: If the build fails, with its last line.
    """
    bundle, report = folder / "built.bundle", folder / "report.json"
    options = ["--backend", args.backend, "--precision", args.precision, "--policy", "none", "--no-calibrate"]
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", str(report), "--"]
    command += [str(model), "-o", str(bundle), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    memory = json.loads(report.read_text(encoding="utf-8"))
    transformer = model / "transformer" if (model / "transformer").is_dir() else model
    weights = sum(tensor_bytes(file) for file in transformer.rglob("*.safetensors"))
    stored = weight_bytes(open_bundle(bundle))
    return Result(
        model=name,
        backend=args.backend,
        precision=args.precision,
        checkpoint=weights,
        bundle=stored,
        ratio=memory["peak"] / min(weights or stored, stored),
        **memory,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="DiT-XL/2", help="(default: %(default)s)")
    parser.add_argument("--backend", default="onnxruntime", help="as of adacorr-build (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="as of adacorr-build (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=2.0, help="times the weights (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="for the model and the bundle (default: the system's temporary one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in the fresh process: where to report
    if "--measure" in sys.argv:
        split = sys.argv.index("--")
        args = parser.parse_args(sys.argv[1:split])
        args.measure.write_text(json.dumps(build_here(sys.argv[split + 1 :])), encoding="utf-8")
        return
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder, model = Path(temporary), Path(args.model)
        if not model.exists():
            say(f"writing a random {args.model}")
            model = write_random_pipeline(args.model, folder / "pipeline")
        say("building")
        result = measured(model, args.model, args, folder)
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        for key, value in asdict(result).items():
            print(f"{key:<12}{value / 1e9:>10.2f} GB" if isinstance(value, int) else f"{key:<12}{value:>10}")
    if result.ratio > args.limit:
        raise SystemExit(f"error: the peak is {result.ratio:.2f} times the weights, allowed is {args.limit:g}.")


if __name__ == "__main__":
    main()
