"""The text of the demo model's card."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Final

from adacorr_deploy.quality.metrics import BootstrapInterval


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What the card says of the run."""

    steps: int
    batch: int
    minutes: int
    loss: float
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceRow:
    """Measured on samples at one guidance."""

    guidance: float
    images: int
    interval: BootstrapInterval
    recognised: float  # share that the classifier assigns to the class asked for


CARD: Final = """# Demo model: a class-conditional DiT on Fashion-MNIST

Made for AdaCorr Deploy, so that the whole path can be tried on a CPU with a model that is trained, not random.

![samples at guidance 4 and 1.5](samples.png)

- **Model**: DiT (arXiv 2212.09748), 12 blocks, width 128, 4 heads, patch 4 on 28×28 grey pixels (49 tokens);
  {parameters:.1f} M parameters. It predicts the noise; no learned variance.
- **Format**: a diffusers pipeline folder (`DiTTransformer2DModel`, `DDIMScheduler`), float32 safetensors. It has no
  VAE: latents are pixels in [−1, 1]. Every block holds its own copy of the embedders, as diffusers' class does.
- **Classes**: 10, named in `labels.json`; label 10 is the null class of classifier-free guidance.
- **Data**: the 60 000 training images of Fashion-MNIST, by Zalando Research (Xiao, Rasul, Vollgraf 2017), MIT licence,
  from Debian's package `dataset-fashion-mnist`. No augmentation.
- **Training**: {steps} steps of {batch} images, {images:.2f} M images seen. Linear schedule 1e-4 … 0.02 over 1 000
  timesteps, labels dropped once per sample with p = 0.1, AdamW (0.9, 0.99) with weight decay 0.01, peak rate 1e-3
  with warm-up and cosine decay, gradient norm at most 1, bfloat16 matrix products; the weights are the running
  average (0.999).
- **Hardware**: two CPU cores (x86-64 with AMX), shared with other work: about {minutes} minutes. No GPU.
- **Last loss**: {loss:.4f}, a running mean of the noise's squared error (`loss.csv`).
- **Licence**: this repository's; the data's is MIT.

Made with:

    python tools/demo/train_dit.py -o build/demo --images {images_argument}
    python tools/demo/package_demo.py build/demo --minutes {minutes}

{remark}
![loss curve](loss.png)
{distances}
## Limits

- A small model, trained briefly on a small data set: a test piece for an inference engine, not a model to draw clothes
  with. Sandals and the handles of bags often fall apart, prints are noise, edges are ragged, and a faint grid of the
  4-pixel patches shows in bright areas.
- Guidance 4, which this project's benchmarks use, gives bright, uniform, sometimes clipped garments; 1.5 is nearer to
  the data's variety and shades.
- Timesteps are embedded as diffusers does it (frequency shift 1), unlike facebookresearch/DiT's checkpoints.

The classifier beside it has its own card: `CLASSIFIER.md`.
"""

DISTANCES: Final = """
## Measured on samples

{steps} DDIM steps in PyTorch, bfloat16 matrix products (for speed). Fréchet distance of the classifier's 64 features to
those of the training images, with a 95 % bootstrap interval (it is not an Inception FID: compare it only with itself;
few images bias it upwards), and the share of samples that the classifier takes for the class asked for. Pixels are
clipped to [−1, 1] first, which matters a great deal here: read `CLASSIFIER.md` before comparing rows.

| guidance | images | Fréchet distance | recognised |
|---|---|---|---|
{rows}
"""


def card_text(training: Training, distances: list[DistanceRow], *, remark: str = "", sampling_steps: int = 50) -> str:
    """Return the card as Markdown; without distances their section is left out."""
    images = training.steps * training.batch
    return CARD.format(
        parameters=training.parameters / 1e6,
        steps=training.steps,
        batch=training.batch,
        images=images / 1e6,
        images_argument=images,
        minutes=training.minutes,
        loss=training.loss,
        remark=textwrap.fill(remark, 118) + "\n" if remark else "",
        distances=DISTANCES.format(rows="\n".join(map(_row, distances)), steps=sampling_steps) if distances else "",
    )


def _row(row: DistanceRow) -> str:
    interval = row.interval
    span = f"{interval.value:.2f} ({interval.low:.2f} … {interval.high:.2f})"
    return f"| {row.guidance:g} | {row.images} | {span} | {100 * row.recognised:.1f} % |"
