"""Train the demo model: a class-conditional DiT on Fashion-MNIST, noise prediction, linear 1000-step schedule.

    python tools/demo/train_dit.py -o build/demo [--images 1000000]

About an hour on two cores (bfloat16 matrix products, compiled blocks). Interrupted and run again with the same
output folder, it goes on from its last checkpoint. Leaves `dit.safetensors` (the averaged weights, in the layout of
facebookresearch/DiT) and `loss.csv`; `package_demo.py` makes the diffusers folder from them.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import torch
from dit import DiT
from fashion_mnist import load_split
from safetensors.torch import save_file

CONFIG = {
    "side": 28,
    "patch": 4,
    "channels": 1,
    "out_channels": 1,
    "width": 128,
    "depth": 12,
    "heads": 4,
    "classes": 10,
    "freq_shift": 1,  # as diffusers embeds timesteps: the shipped folder is a diffusers one
}
BATCH = 128
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 400
LABEL_DROP = 0.1
EMA_DECAY = 0.999
CHECKPOINT_STEPS = 250


def alphas_cumprod() -> torch.Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()


def learning_rate(step: int, total_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS)))


def train(output: Path, total_steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = DiT(**CONFIG)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, step, losses = output / "checkpoint.pt", 0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, step, losses = saved["ema"], saved["step"], saved["losses"]
    raw_images, raw_labels = load_split("train")
    images = torch.from_numpy(raw_images.copy()).float().div(127.5).sub(1)[:, None]
    labels = torch.from_numpy(raw_labels)
    signal, noise_share = alphas_cumprod().sqrt(), (1 - alphas_cumprod()).sqrt()
    parameters = dict(model.named_parameters())
    for block in model.blocks:
        block.compile()
    started, first_step, recent = time.perf_counter(), step, 0.0
    while step < total_steps:
        draw = torch.Generator().manual_seed(step)  # a step's draws depend on nothing but its number: resuming is exact
        chosen = torch.randint(len(images), (BATCH,), generator=draw)
        timesteps = torch.randint(1000, (BATCH,), generator=draw)
        noise = torch.randn(BATCH, 1, 28, 28, generator=draw)
        dropped = torch.rand(BATCH, generator=draw) < LABEL_DROP
        noisy = signal[timesteps, None, None, None] * images[chosen] + noise_share[timesteps, None, None, None] * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps, labels[chosen].masked_fill(dropped, CONFIG["classes"]))
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        decay = min(EMA_DECAY, step / (step + 10))
        with torch.no_grad():
            for name, value in parameters.items():
                ema[name].lerp_(value, 1 - decay)
        recent = loss.item() if recent == 0 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            losses.append([step, recent])
            rate = (step - first_step) * BATCH / (time.perf_counter() - started)
            left = (total_steps - step) * BATCH / rate / 60
            print(f"step {step}/{total_steps}  loss {recent:.4f}  {rate:.0f} images/s  {left:.0f} min left", flush=True)
        if step % CHECKPOINT_STEPS == 0 or step == total_steps:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step,
                "losses": losses,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
            save_file({name: value.contiguous() for name, value in ema.items()}, output / "dit.safetensors")
            with (output / "loss.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["step", "loss"], *losses])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_000_000, help="training images in all (default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train(args.output, args.images // BATCH)


if __name__ == "__main__":
    main()
