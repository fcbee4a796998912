"""Train the pocket model's VAE: diffusers' AutoencoderKLQwenImage, small, on 64 px OpenMoji of both styles.

    python assets/pocket/train_vae.py --data data/openmoji-color data/openmoji-line --out outputs/pocket_vae

A causal 3-D convolution meets a still image with its last temporal slice only (the others see zero padding), so
training runs it as a 2-D convolution with that slice; every other temporal weight is set to zero and stays zero.

Shapes: B = batch, C = 3 colours, H = W = 64 pixels, Z = 16 latent channels, h = w = 8 latent positions; T = 1 frame.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageCausalConv3d,
    QwenImageRMS_norm,
)
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

ARCHITECTURE = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
STATE_FILE = "training_state.pt"
CHECKPOINT_EVERY_SECONDS = 180
THREAD_TRIAL_STEPS = 200  # how often the thread count is chosen anew
WARMUP_FRACTION = 0.02
FINAL_LR_FRACTION = 0.01
EMA_DECAY = 0.998
# Guesses, looked at by eye on reconstructions; nothing was swept.
EDGE_WEIGHT, SQUARE_WEIGHT, KL_WEIGHT = 0.5, 1.0, 1e-5
LATENT_NOISE = (
    0.08  # share of each channel's standard deviation; makes the decoder forgive a sampler's errors
)


@dataclass
class Run:
    """All that a resumed run needs to go on as if it had never stopped, but for its random numbers."""

    vae: AutoencoderKLQwenImage
    averaged: AveragedModel
    optimizer: torch.optim.Optimizer
    spent_seconds: float = 0.0
    step: int = 0


def main() -> None:
    """Train from the command line."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    images = torch.cat([read_images(folder) for folder in args.data])
    print(f"{len(images)} images", flush=True)
    run_convolutions_in_2d()
    if args.start is None:
        vae = AutoencoderKLQwenImage(**ARCHITECTURE)
        zero_unseen_temporal_weights_(vae)
    else:
        vae = AutoencoderKLQwenImage.from_pretrained(args.start, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-4
    )
    train(Run(vae, AveragedModel(vae, multi_avg_fn=average_), optimizer), images, args)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of `prepare_openmoji`"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="VAE folder; an interrupted run is resumed",
    )
    parser.add_argument(
        "--minutes", type=float, default=40, help="wall time; the learning rate follows it"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="folder of a VAE to go on from; unset means new")
    parser.add_argument("--colour-weight", type=float, default=2.0, help="of 4 and 8 px areas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_images(folder: Path) -> Tensor:
    """Read a data set's pictures. Returns (N, C, H, W) float32 in [-1, 1]."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        names = [row["file_name"] for row in csv.DictReader(file)]
    pixels = np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def run_convolutions_in_2d() -> None:
    """Make the VAE classes quick on one frame; the results stay those of the published forward to rounding."""

    def conv_forward(
        self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None
    ) -> Tensor:
        return F.conv2d(
            x.squeeze(2), self.weight[:, :, -1], self.bias, padding=self._padding[0]
        ).unsqueeze(2)

    def norm_forward(self: QwenImageRMS_norm, x: Tensor) -> Tensor:
        rms_inverse = x.float().square().mean(dim=1, keepdim=True).add(1e-12).rsqrt()
        return x * rms_inverse.to(x.dtype) * self.gamma.to(x.dtype)

    QwenImageCausalConv3d.forward = conv_forward
    QwenImageRMS_norm.forward = norm_forward


@torch.no_grad()
def zero_unseen_temporal_weights_(vae: AutoencoderKLQwenImage) -> None:
    """Zero all that a single frame never reaches, so that the files are well defined and compress."""
    for name, module in vae.named_modules():
        if isinstance(module, QwenImageCausalConv3d):
            if name.endswith("time_conv"):
                module.weight.zero_()
                module.bias.zero_()
            else:
                module.weight[:, :, :-1].zero_()


def permute_colours(x: Tensor) -> Tensor:
    """Swap the colour channels of about half of (B, C, H, W), so that green and blue are as common as red.

    Emojis are mostly yellow, brown and red; without this those are learnt first and the others late or never.
    """
    kept = torch.arange(x.shape[1])
    orders = [torch.randperm(x.shape[1]) if torch.rand(()) < 0.5 else kept for _ in x]
    return x.gather(1, torch.stack(orders)[:, :, None, None].expand_as(x))


def encode(vae: AutoencoderKLQwenImage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode (B, C, H, W). Returns mean and log variance, both (B, Z, 1, h, w)."""
    return vae.quant_conv(vae.encoder(x.unsqueeze(2))).float().chunk(2, dim=1)


def decode(vae: AutoencoderKLQwenImage, z: Tensor) -> Tensor:
    """Decode (B, Z, 1, h, w) to (B, C, H, W), not clamped."""
    return vae.decoder(vae.post_quant_conv(z)).float().squeeze(2)


def compute_loss(
    vae: AutoencoderKLQwenImage, x: Tensor, *, colour_weight: float
) -> tuple[Tensor, Tensor]:
    """Weigh pixels, colours of areas, edges and the latent prior. Returns (total, pixel L1), scalars."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = encode(vae, x)
        log_variance = log_variance.clamp(-20, 4)
        channel_std = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
        std = (log_variance.exp() + (LATENT_NOISE * channel_std).square()).sqrt()
        y = decode(vae, mean + std * torch.randn_like(mean))
    pixel = F.l1_loss(y, x)
    square = F.mse_loss(y, x)
    colour = sum(F.l1_loss(F.avg_pool2d(y, side), F.avg_pool2d(x, side)) for side in (4, 8))
    edge = sum(F.l1_loss(y.diff(dim=dim), x.diff(dim=dim)) for dim in (2, 3))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    total = (
        pixel
        + SQUARE_WEIGHT * square
        + colour_weight * colour
        + EDGE_WEIGHT * edge
        + KL_WEIGHT * kl
    )
    return total, pixel.detach()


def learning_rate_fraction(progress: float) -> float:
    """Linear warm-up, then a cosine to FINAL_LR_FRACTION; progress runs from 0 to 1."""
    if progress < WARMUP_FRACTION:
        return progress / WARMUP_FRACTION
    cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION))
    return FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine


def train(run: Run, images: Tensor, args: argparse.Namespace) -> None:
    """Train by wall time with a checkpoint every three minutes; the modules of `run` are changed in place."""
    load_state_(run, args.out)
    total_seconds = args.minutes * 60
    started, saved = time.monotonic() - run.spent_seconds, time.monotonic()
    step_seconds = dict.fromkeys(range(1, args.threads + 1), 0.0)
    while run.spent_seconds < total_seconds:
        # A busy neighbour on one core stalls every thread that waits for the one there:
        # from time to time try all thread counts, then keep the quickest.
        trial = run.step % THREAD_TRIAL_STEPS // 4 + 1
        is_trial = trial in step_seconds
        torch.set_num_threads(
            trial if is_trial else min(step_seconds, key=step_seconds.__getitem__)
        )
        for group in run.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_fraction(run.spent_seconds / total_seconds)
        x = permute_colours(images[torch.randint(len(images), (args.batch_size,))])
        x = x.contiguous(memory_format=torch.channels_last)
        total, pixel = train_step_(run, x, colour_weight=args.colour_weight)
        run.step += 1
        previous_seconds, run.spent_seconds = run.spent_seconds, time.monotonic() - started
        if is_trial:
            step_seconds[trial] = run.spent_seconds - previous_seconds
        if run.step % 50 == 0:
            progress = (
                f"step {run.step} {run.spent_seconds:.0f} s threads {torch.get_num_threads()}"
            )
            print(f"{progress} loss {total:.4f} pixel L1 {pixel:.4f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_EVERY_SECONDS:
            save(run, args.out, images)
            saved = time.monotonic()
    save(run, args.out, images)
    state_path(args.out).unlink()


def train_step_(run: Run, x: Tensor, *, colour_weight: float) -> tuple[float, float]:
    """Take one optimiser step on (B, C, H, W). Returns the total loss and the pixel L1 before it."""
    total, pixel = compute_loss(run.vae, x, colour_weight=colour_weight)
    total.backward()
    torch.nn.utils.clip_grad_norm_(run.vae.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.averaged.update_parameters(run.vae)
    return total.item(), pixel.item()


@torch.no_grad()
def average_(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
    """Move the averaged weights towards the current ones; slow only after the first thousand steps."""
    steps = float(num_averaged)
    torch._foreach_lerp_(averaged, current, 1 - min(EMA_DECAY, (1 + steps) / (10 + steps)))


def state_path(out: Path) -> Path:
    """Name the resume file: beside the output folder, so that the folder holds the published layout only."""
    return out.with_name(f"{out.name}.{STATE_FILE}")


def load_state_(run: Run, out: Path) -> None:
    """Go on where an interrupted run was last saved, if there is one."""
    if not state_path(out).exists():
        return
    state = torch.load(state_path(out), weights_only=True)
    run.vae.load_state_dict(state["vae"])
    run.averaged.load_state_dict(state["averaged"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.spent_seconds, run.step = state["spent_seconds"], state["step"]


def save(run: Run, out: Path, images: Tensor) -> None:
    """Write the averaged weights as a VAE folder (bfloat16) and the resume file, each replaced by a rename."""
    state = {
        "vae": run.vae.state_dict(),
        "averaged": run.averaged.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "spent_seconds": run.spent_seconds,
        "step": run.step,
    }
    temp_state = state_path(out).with_suffix(".tmp")
    torch.save(state, temp_state)
    temp_state.replace(state_path(out))

    stored = AutoencoderKLQwenImage(**ARCHITECTURE)
    stored.load_state_dict(run.averaged.module.state_dict())
    stored.to(torch.bfloat16).float()  # what is measured is what a reader of the file gets
    latents_mean, latents_std, psnr = measure(stored, images)
    print(f"saved at {run.spent_seconds:.0f} s; PSNR by quarter of the data: {psnr}", flush=True)
    stored.register_to_config(latents_mean=latents_mean, latents_std=latents_std)
    temp_out = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temp_out, ignore_errors=True)
    stored.to(torch.bfloat16).save_pretrained(temp_out)
    shutil.rmtree(out, ignore_errors=True)
    temp_out.replace(out)


@torch.no_grad()
def measure(
    vae: AutoencoderKLQwenImage, images: Tensor
) -> tuple[list[float], list[float], list[float]]:
    """Compute each latent channel's mean and std over the data, and the PSNR (dB) of four consecutive quarters."""
    latents = torch.cat([encode(vae, x)[0] for x in images.split(32)])
    decoded = torch.cat([decode(vae, z).clamp(-1, 1) for z in latents.split(32)])
    square_error = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    psnr = [round(float(-10 * quarter.log10().mean()), 2) for quarter in square_error.chunk(4)]
    by_channel = latents.transpose(0, 1).flatten(1)
    return by_channel.mean(dim=1).tolist(), by_channel.std(dim=1).tolist(), psnr


if __name__ == "__main__":
    main()
