"""Predicted peak of a training step beside the measured one, for a DiT of about 300M parameters.

    python benchmarks/forecast.py [--device cuda] [--blocks 8] [--width 1024] [--size-px 256]

Prediction: `forecast_run` on fake tensors. Measurement: two optimizer steps of a LoRA on random weights; the second one
counts. On the CPU tensor bytes are counted as they come and go (`MeasuredBytes`); on CUDA it is
torch.cuda.max_memory_allocated. The machine's other work doesn't change the figures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.models import Family, get_family
from framework.plan.table import format_bytes
from framework.plan.types import VramPlan
from framework.runtime.devices import COMPUTE_DTYPES, resolve_device
from framework.runtime.forecast import forecast_run
from framework.runtime.load import load_component
from framework.runtime.trace import MeasuredBytes
from framework.schema import RunConfig
from framework.storage.fetching import Fetcher
from framework.training.optimizers import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
TEXT_TOKENS = 64
HEAD_WIDTH = 128
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, checkpointing": {"gradient_checkpointing": True},
    "fp8": {"precision": "fp8"},
    "fp8, checkpointing": {"precision": "fp8", "gradient_checkpointing": True},
    "fp8, host, block": {"precision": "fp8", "offload": "host", "granularity": "block"},
}


def main() -> None:
    """Print one line for each way to store the DiT."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--size-px", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    device = resolve_device(options.device)
    family = get_family("qwen_image")
    print(
        f"{'case':22} {'predicted':>12} {'measured':>12} {'ratio':>7} {'resting':>8} {'trace':>7}"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), num_layers=options.blocks, width=options.width)
        for name, dit in CASES.items():
            config = make_config(Path(folder), dit, options)
            began = time.perf_counter()
            plan = forecast_run(config, device=str(device), text_tokens=TEXT_TOKENS, family=family)
            seconds = time.perf_counter() - began
            predicted = predicted_bytes(plan)
            measured, resting = measured_bytes(plan, config, family, device)
            exact = "exact" if resting == plan.component("dit").resting_bytes else "OFF"
            print(
                f"{name:22} {format_bytes(predicted):>12} {format_bytes(measured):>12} "
                f"{predicted / measured:7.4f} {exact:>8} {seconds:6.1f}s",
                flush=True,
            )


def write_checkpoint(folder: Path, *, num_layers: int, width: int) -> None:
    """A DiT with random weights beside the pocket model's other components."""
    from diffusers import QwenImageTransformer2DModel

    pocket = ROOT / "assets" / "pocket"
    for name in ("text_encoder", "vae", "tokenizer", "scheduler"):
        shutil.copytree(pocket / name, folder / name)
    width_of_text = json.loads((pocket / "transformer" / "config.json").read_text())
    torch.manual_seed(0)
    untyped: Any = QwenImageTransformer2DModel
    model = untyped(
        num_layers=num_layers,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=width // HEAD_WIDTH,
        joint_attention_dim=width_of_text["joint_attention_dim"],
        axes_dims_rope=(16, 56, 56),
    ).to(torch.bfloat16)
    model.save_pretrained(folder / "transformer")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


def make_config(folder: Path, dit: dict[str, Any], options: argparse.Namespace) -> RunConfig:
    """A LoRA run on the checkpoint; its data needn't exist."""
    return RunConfig.model_validate(
        {
            "model": {
                "family": "qwen_image",
                "source": str(folder),
                "dit": {"trainable": "lora", **dit},
            },
            "data": {
                "path": "nowhere",
                "max_px": options.size_px**2,
                "max_aspect_ratio": 1,
                "batch_size": options.batch_size,
            },
            "run": {"name": "forecast"},
        }
    )


def predicted_bytes(plan: VramPlan) -> int:
    """On the CPU host memory is the same memory."""
    train = plan.phase("train")
    return train.device_bytes + (train.host_bytes if plan.device == "cpu" else 0)


def measured_bytes(
    plan: VramPlan, config: RunConfig, family: Family, device: torch.device
) -> tuple[int, int]:
    """Peak of the second step, and bytes of the weights at rest."""
    is_cuda = device.type == "cuda"
    counter = None if is_cuda else MeasuredBytes(device)
    part = plan.component("dit")
    with counter or nullcontext():
        fetcher = Fetcher(device)
        dit: Any = load_component(
            part, family, device=device, compute_dtype=torch.bfloat16, fetcher=fetcher
        )
        resting = sum(group.resting_bytes for group in part.groups if group.moves)
        resting += sum(
            tensor.untyped_storage().nbytes()
            for name, tensor in {
                **dict(dit.named_parameters()),
                **dict(dit.named_buffers()),
            }.items()
            if "lora_" not in name and name in dit.state_dict()
        )
        dit.train()
        if part.gradient_checkpointing:
            dit.enable_gradient_checkpointing()
        optimizer = build_optimizer(config.optim, dit.named_parameters())
        train_step(dit, optimizer, family, plan, device)
        if counter is not None:
            counter.restart()
        else:
            torch.cuda.reset_peak_memory_stats(device)
        train_step(dit, optimizer, family, plan, device)
        peak = torch.cuda.max_memory_allocated(device) if counter is None else counter.peak_bytes
        fetcher.close()
    return peak, resting


def train_step(
    dit: Any, optimizer: torch.optim.Optimizer, family: Family, plan: VramPlan, device: torch.device
) -> None:
    """One step in the order of Lightning's loop: gradients go after the forward pass."""
    used = plan.traced_with
    assert used is not None
    assert used.size_px is not None
    size = used.batch_size
    latents = family.initial_latents(*used.size_px, 0).repeat(size, 1, 1, 1).to(device)
    noise = torch.randn_like(latents)
    sigma = torch.full((size,), 0.5, device=device)
    dtype = COMPUTE_DTYPES[plan.compute_dtype]
    blank = family.blank_text(used.text_tokens, dit, batch_size=size, device=device)
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        text = replace(blank.to(dtype=dtype), padded=size > 1)
        del blank
        velocity = family.predict(0.5 * (latents + noise), sigma, text, dit)
        loss = (velocity - (noise - latents)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


if __name__ == "__main__":
    main()
