"""Make the shipped demo model, a diffusers pipeline folder with its card and pictures, from what train_dit.py left.

    python tools/demo/package_demo.py build/demo [-o adacorr_deploy/demo] [--minutes 75] [--frechet-images 1000]

Converts the weights (and refuses unless diffusers' model then computes what the trained one does), samples with
diffusers' own scheduler in a plain loop, and writes the card. Nearly all of its time goes into the images for the
Fréchet distance, ten minutes on two cores; with 0 it takes a minute or two.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from dit import DiT
from fashion_mnist import CLASS_NAMES
from matplotlib import pyplot as plt
from model_card import DistanceRow, Training, card_text
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from train_dit import BATCH, CONFIG

from adacorr_deploy.exporters.dit_original import diffusers_from_original, set_frequency_shift
from adacorr_deploy.plugins.oracle import philox_normals
from adacorr_deploy.quality.classifier import load_classifier, load_reference_statistics
from adacorr_deploy.quality.metrics import bootstrap_frechet
from adacorr_deploy.quality.pictures import ImageGrid, picture_of_grids, write_picture

mpl.use("Agg")  # needs no display

PACKAGE_DEMO = Path(__file__).resolve().parents[2] / "adacorr_deploy" / "demo"
GUIDANCES = (4.0, 1.5)
STEPS = 50
PER_CLASS = 8
BATCH_IMAGES = 100
NULL_LABEL = len(CLASS_NAMES)
AGREEMENT = 2e-4  # largest difference between the trained module and diffusers', of outputs of about 1


def transformer_from_training(state: dict[str, Tensor], where: str) -> DiTTransformer2DModel:
    """Convert the weights; unlike the converter's model, each block owns its embedders, as `save_pretrained` needs."""
    shared = diffusers_from_original(state, where=where, heads=CONFIG["heads"])
    config = {key: value for key, value in shared.config.items() if not key.startswith("_")}
    model = DiTTransformer2DModel(**config)
    model.load_state_dict(shared.state_dict(), strict=True)
    set_frequency_shift(model, CONFIG["freq_shift"])
    return model.eval().requires_grad_(False)


def largest_disagreement(model: DiTTransformer2DModel, state: dict[str, Tensor]) -> float:
    """Compare with the trained module itself on noise, for every label and many timesteps."""
    trained = DiT(**CONFIG).eval()
    trained.load_state_dict(state)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(NULL_LABEL + 1, 1, CONFIG["side"], CONFIG["side"], generator=draw)
    labels, timesteps = torch.arange(NULL_LABEL + 1), torch.linspace(0, 999, NULL_LABEL + 1).long()
    with torch.inference_mode():
        return float((model(images, timesteps, labels).sample - trained(images, timesteps, labels)).abs().max())


def demo_scheduler() -> DDIMScheduler:
    """Return DDIM over the training schedule.

    Stepping to ᾱ = 1 at the end leaves no noise; without `set_alpha_to_one` the last step would do nothing.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def initial_latents(count: int, seed: int) -> Tensor:
    """Draw each image's noise from its own stream, as the runtime does: an image does not depend on its neighbours."""
    shape = (CONFIG["channels"], CONFIG["side"], CONFIG["side"])
    images = [philox_normals(seed, index, 0, math.prod(shape)) for index in range(count)]
    return torch.from_numpy(np.stack(images).reshape(count, *shape))


def sample(model: DiTTransformer2DModel, labels: Tensor, guidance: float, seed: int) -> NDArray[np.float32]:
    """Sample (N, 1, 28, 28) in about [−1, 1] with diffusers' scheduler and classifier-free guidance."""
    latents = initial_latents(len(labels), seed)
    batches = zip(latents.split(BATCH_IMAGES), labels.split(BATCH_IMAGES), strict=True)
    return np.concatenate([_sample_batch(model, batch, chosen, guidance).numpy() for batch, chosen in batches])


@torch.inference_mode()
def _sample_batch(model: DiTTransformer2DModel, latents: Tensor, labels: Tensor, guidance: float) -> Tensor:
    scheduler = demo_scheduler()
    scheduler.set_timesteps(STEPS)
    both_labels = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    for timestep in scheduler.timesteps:
        output = model(torch.cat([latents, latents]), timestep.expand(len(both_labels)), both_labels).sample.float()
        conditional, unconditional = output.chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents).prev_sample
    return latents


def write_samples(model: DiTTransformer2DModel, path: Path, guidances: tuple[float, ...], scale: int) -> None:
    labels = torch.arange(len(CLASS_NAMES)).repeat_interleave(PER_CLASS)
    grids = [
        ImageGrid(title=f"guidance {guidance:g}", images=sample(model, labels, guidance, seed=0), columns=PER_CLASS)
        for guidance in guidances
    ]
    title = f"Demo DiT, {STEPS} DDIM steps, diffusers in PyTorch, seed 0"
    write_picture(path, picture_of_grids(grids, row_names=CLASS_NAMES, title=title, scale=scale))


def frechet_rows(model: DiTTransformer2DModel, images: int) -> list[DistanceRow]:
    """Return the Fréchet distance to the training images, for each guidance, with equally many images per class."""
    if not images:
        return []
    classifier, reference = load_classifier(), load_reference_statistics()
    labels = torch.arange(images) % len(CLASS_NAMES)
    rows = []
    for guidance in GUIDANCES:
        with torch.autocast("cpu", torch.bfloat16):  # for speed alone
            sampled = sample(model, labels, guidance, seed=1)
        recognised = float((classifier.logits(sampled).argmax(axis=1) == labels.numpy()).mean())
        interval = bootstrap_frechet(classifier.features(sampled), reference, labels=labels.numpy())
        rows.append(DistanceRow(guidance=guidance, images=images, interval=interval, recognised=recognised))
        print(f"guidance {guidance:g}: Fréchet distance {interval.value:.3f}, recognised {recognised:.3f}", flush=True)
    return rows


def write_loss_curve(losses: list[tuple[int, float]], path: Path) -> None:
    steps, values = zip(*losses, strict=True)
    figure, axes = plt.subplots(figsize=(7, 3.5), dpi=120)
    axes.plot(np.array(steps) * BATCH / 1e6, values)
    axes.set(xlabel="training images seen, millions", ylabel="mean squared error of the noise", yscale="log")
    axes.set_title("Demo DiT: training loss (running mean)")
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def losses_from_csv(path: Path) -> list[tuple[int, float]]:
    with path.open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def package(training: Path, output: Path, *, minutes: int, frechet_images: int, remark: str) -> None:
    """Write the folder; the pictures and the card come after the weights, which everything else is made from."""
    state = load_file(training / "dit.safetensors")
    losses = losses_from_csv(training / "loss.csv")
    model = transformer_from_training(state, str(training / "dit.safetensors"))
    if (error := largest_disagreement(model, state)) > AGREEMENT:
        raise SystemExit(
            f"diffusers' model differs from the trained one by {error:.2e}; at most {AGREEMENT} is rounding."
        )
    print(f"diffusers' model agrees with the trained one to {error:.1e}")
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output / "transformer", safe_serialization=True)
    (output / "transformer" / "diffusion_pytorch_model.safetensors").chmod(0o644)  # safetensors makes it private
    demo_scheduler().save_pretrained(output / "scheduler")
    write_json(
        output / "model_index.json",
        {
            "_class_name": "DiTPipeline",
            "_diffusers_version": model.config["_diffusers_version"],
            "id2label": {str(label): name for label, name in enumerate(CLASS_NAMES)},
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": [None, None],
        },
    )
    write_json(output / "labels.json", list(CLASS_NAMES))
    (output / "loss.csv").write_bytes((training / "loss.csv").read_bytes())
    write_loss_curve(losses, output / "loss.png")
    write_samples(model, output / "samples.png", GUIDANCES, scale=3)
    parameters = sum(value.numel() for value in state.values())
    run = Training(steps=losses[-1][0], batch=BATCH, minutes=minutes, loss=losses[-1][1], parameters=parameters)
    card = card_text(run, frechet_rows(model, frechet_images), remark=remark, sampling_steps=STEPS)
    (output / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path, help="folder with train_dit.py's dit.safetensors and loss.csv")
    parser.add_argument("-o", "--output", type=Path, default=PACKAGE_DEMO)
    parser.add_argument(
        "--minutes", type=int, default=75, help="how long training took, for the card (default: %(default)s)"
    )
    parser.add_argument("--frechet-images", type=int, default=1000, help="per guidance; 0 leaves the table out")
    parser.add_argument(
        "--remark", default="", help="a sentence for the card, on how this run differed from the command"
    )
    args = parser.parse_args()
    package(args.training, args.output, minutes=args.minutes, frechet_images=args.frechet_images, remark=args.remark)


if __name__ == "__main__":
    main()
