"""The whole path on the bundled demo model, with the commands that a user has: build, validate, run, bench.

    bash tools/quickstart.sh [-o build/quickstart]

Leaves the bundle, the pictures and the commands' JSON in the output folder, and prints a short table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from adacorr_deploy.core.manifest import manifest_from_json
from adacorr_deploy.quality.pictures import ImageGrid, difference_grid, picture_of_grids, write_picture

ROOT = Path(__file__).resolve().parent.parent
POLICIES = "fewer-steps@2,fora,scheduled@2,robust@2"
PER_CLASS = 4
SEED = 7

console = Console(width=None if sys.stdout.isatty() else 120)


def command(name: str, *arguments: str) -> Any:  # noqa: ANN401  JSON
    """Run one of the adacorr commands with --json, and return what it says; its progress goes to the terminal."""
    console.print(
        f"$ adacorr-{name} {' '.join(arguments)}", style="bold", highlight=False, markup=False, soft_wrap=True
    )
    line = [str(Path(sys.executable).with_name(f"adacorr-{name}")), *arguments, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):  # 1 is a failed validation: its report is shown below
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)


def sampled(bundle: Path, output: Path, policy: str, labels: list[int]) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    latents = output / f"{policy}.npy"
    result = command(
        "run", str(bundle), "--policy", policy, "--class-labels", ",".join(map(str, labels)), "--seed", str(SEED),
        "--save-latents", str(latents), "--trace", str(output / f"{policy}-trace.json"),
    )  # fmt: skip
    return np.load(latents, allow_pickle=False), result


def write_comparison(bundle: Path, output: Path) -> Path:
    """Sample the same images with and without reuse, and put them side by side with their difference."""
    manifest = manifest_from_json((bundle / "manifest.json").read_text(encoding="utf-8"), where=str(bundle))
    names = manifest.class_names or tuple(str(label) for label in range(manifest.model.num_classes))
    labels = [label for label in range(len(names)) for _ in range(PER_CLASS)]
    uncached, plain = sampled(bundle, output, "none", labels)
    reused, cached = sampled(bundle, output, "robust@2", labels)
    before = ImageGrid(title=f"every block evaluated, {plain['seconds']:.1f} s", images=uncached, columns=PER_CLASS)
    after = ImageGrid(
        title=f"AdaCorrection, {cached['rho']:.0%} of block launches skipped, {cached['seconds']:.1f} s",
        images=reused,
        columns=PER_CLASS,
    )
    picture = picture_of_grids(
        [before, after, difference_grid(after, before, gain=4.0)],
        title="DiT on Fashion-MNIST, 50 DDIM steps, guidance 4, the same noise",
        row_names=names,
    )
    path = output / "with-and-without-reuse.png"
    write_picture(path, picture)
    return path


def show_table(rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("policy", "steps", "seconds", "speed-up", "ρ", "efficiency", "PSNR dB", "SSIM"):
        table.add_column(title, justify="left" if title == "policy" else "right")
    for row in rows:
        psnr = "–" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        table.add_row(
            row["policy"], str(row["steps"]), f"{row['seconds']:.2f}", f"{row['speedup']:.2f}×", f"{row['rho']:.2f}",
            f"{row['efficiency']:.2f}", psnr, f"{row['ssim']:.4f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "build" / "quickstart")
    output: Path = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    bundle = output / "demo.bundle"
    built = command("build", "demo", "-o", str(bundle), "--overwrite")
    validation = command("validate", str(bundle), "--reference", "demo", "--policy", "robust@2")
    (output / "validation.json").write_text(json.dumps(validation, indent=1), encoding="utf-8")
    picture = write_comparison(bundle, output)
    rows = command("bench", str(bundle), "--policies", POLICIES, "--seed", "1000")
    (output / "bench.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")

    console.rule()
    worst = max(part["rel_l2"] for part in validation["parts"].values())
    trajectory = validation["trajectory"]["rel_l2"]
    console.print(
        f"Built {built['parts']} parts in {built['seconds']:.0f} s. Against PyTorch: "
        f"[bold]{'passed' if validation['passed'] else 'FAILED'}[/bold] "
        f"(worst part {worst:.1e}, 50-step trajectory {trajectory:.1e}, relative).",
        highlight=False,
    )
    show_table(rows)
    console.print(
        "speed-up, PSNR and SSIM are against the uncached run; efficiency = speed-up ÷ ideal speed-up at this ρ"
    )
    for path in (picture, bundle):
        console.print(str(path), highlight=False, soft_wrap=True)
    raise SystemExit(0 if validation["passed"] else 1)


if __name__ == "__main__":
    main()
