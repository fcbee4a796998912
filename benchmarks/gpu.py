"""Octavo on your card, by one command: `python benchmarks/gpu.py [--layers 12] [--tokens 1024,4096] [--json FILE]`.

A LoRA step (rank 16, batch 1, bf16 arithmetic) on a frozen Qwen-Image DiT of random weights: in bf16, in FP8 decoded
before each product, in FP8 decoded inside it, and in FP8 that rests in pinned host memory. A block has 0.34 billion
weights; the published model has 60 of them, and time and memory grow in proportion, so 12 tell enough. One way at a
time, each in a process of its own; medians of steps. Peak is what CUDA's allocator gave out at most during a step.
`--device cpu --layers 1 --width 256` tries the script without a card.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from one_step import Way, write_checkpoint

WAYS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "FP8": {},
    "FP8, fused": {"fused": True},
    "FP8, host, block": {"offload": "host", "granularity": "block"},
    "FP8, host, layer": {"offload": "host", "granularity": "layer"},
    "FP8, host, layer, half kept": {"offload": "host", "granularity": "layer", "keep": 0.5},
    "FP8, fused, host, layer": {"offload": "host", "granularity": "layer", "fused": True},
}

COLUMNS = (
    "storage",
    "step, ms",
    "against bf16",
    "peak, GiB",
    "against bf16",
    "weights at rest on the device, GiB",
    "loaded in, s",
)


def measure(options: argparse.Namespace, folder: Path, tokens: int) -> dict[str, dict[str, float]]:
    """Way -> what was measured, at one number of image tokens."""
    results: dict[str, dict[str, float]] = {}
    for name in options.ways:
        way = Way(
            name,
            folder=str(folder),
            device=options.device,
            threads=options.threads,
            tokens=tokens,
            text_tokens=options.text_tokens,
            checkpointing=options.checkpointing,
            **WAYS[name],
        )
        if "missing" in way.about:
            print(f"left out: {name} ({way.about['missing']})", file=sys.stderr)
            way.close()
            continue
        seconds = [way.ask("step")["seconds"] for _ in range(options.steps)]
        peak = way.ask("peak")["peak_bytes"]
        way.close()
        results[name] = {"seconds": median(seconds), "peak_bytes": peak, **way.about}
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown; ratios to the first way."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    base = next(iter(results.values()))
    for name, got in results.items():
        cells = [
            name,
            f"{1000 * got['seconds']:.1f}",
            f"{got['seconds'] / base['seconds']:.2f}",
            f"{got['peak_bytes'] / 2**30:.2f}",
            f"{got['peak_bytes'] / base['peak_bytes']:.2f}",
            f"{got['resting_bytes'] / 2**30:.2f}",
            f"{got['loading_seconds']:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--tokens", default=[1024, 4096], **numbers)
    parser.add_argument("--text-tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: try --device cpu --layers 1 --width 256 --tokens 64")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.layers} blocks of width {options.width}")
    results = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_checkpoint(Path(folder), layers=options.layers, width=options.width)
        for tokens in options.tokens:
            results[tokens] = measure(options, Path(folder), tokens)
            print(
                f"\n{tokens} image tokens, {options.text_tokens} text tokens\n\n{table(results[tokens])}"
            )
    if options.json:
        options.json.write_text(json.dumps({"device": name, "results": results}, indent=2))


if __name__ == "__main__":
    main()
