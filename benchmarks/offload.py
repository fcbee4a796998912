"""What it costs to keep frozen weights elsewhere: a LoRA step on one DiT, by offload and granularity.

    python benchmarks/offload.py [--precision fp8] [--tokens 256] [--layers 5] [--width 1024] [--rounds 7]
                                 [--checkpointing] [--cold] [--device cuda] [--json FILE]

Each way runs in a process of its own; rounds are interleaved, one step of each at a time, and times are medians of
per-round ratios to the same plan without offload. "Half kept" fetches layer by layer and lets half of the weights stay.
Peak: on CUDA what the allocator gave out at most during a step. On the CPU device and host are the same memory, so the
peak is the whole process's, resting host copies included; what a device would hold of the weights is the column before.
Files are read from the system's cache unless --cold drops them before every step.
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
    "none": {},
    "host, model": {"offload": "host", "granularity": "model"},
    "host, block": {"offload": "host", "granularity": "block"},
    "host, layer": {"offload": "host", "granularity": "layer"},
    "host, layer, half kept": {"offload": "host", "granularity": "layer", "keep": 0.5},
    "disk, model": {"offload": "disk", "granularity": "model"},
    "disk, block": {"offload": "disk", "granularity": "block"},
    "disk, layer": {"offload": "disk", "granularity": "layer"},
}
COLUMNS = (
    "offload",
    "step time",
    "ms",
    "fetched a step, MB",
    "weights on the device, MB",
    "peak, MB",
    "peak",
)


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run all ways side by side."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        write_checkpoint(Path(name), layers=options.layers, width=options.width)
        shared = {
            "folder": name,
            "device": options.device,
            "threads": options.threads,
            "tokens": options.tokens,
            "precision": options.precision,
            "checkpointing": options.checkpointing,
            "cold": options.cold,
        }
        ways = [Way(way, **shared, **WAYS[way]) for way in options.ways]
        seconds: dict[str, list[float]] = {way.name: [] for way in ways}
        for _ in range(options.rounds):
            for way in ways:
                seconds[way.name].append(way.ask("step")["seconds"])
        peaks = {way.name: median(way.ask("peak")["peak_bytes"] for _ in range(3)) for way in ways}
        for way in ways:
            way.close()
    base = ways[0].name
    return {
        way.name: {
            "time": median(t / b for t, b in zip(seconds[way.name], seconds[base], strict=True)),
            "seconds": median(seconds[way.name]),
            "peak": peaks[way.name] / peaks[base],
            "peak_bytes": peaks[way.name],
            **way.about,
        }
        for way in ways
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for way, got in results.items():
        on_device = got["resting_bytes"] + got["held_bytes"]
        cells = [
            way,
            f"{got['time']:.2f}",
            f"{1000 * got['seconds']:.0f}",
            f"{got['fetched_bytes'] / 1e6:.0f}",
            f"{on_device / 1e6:.0f}",
            f"{got['peak_bytes'] / 1e6:.0f}",
            f"{got['peak']:.2f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for a while")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(
        f"{options.device}, {options.precision}, {options.tokens} image tokens, {options.layers} blocks of width "
        f"{options.width}{', checkpointing' if options.checkpointing else ''}{', cold' if options.cold else ''}; "
        f"{options.rounds} rounds, {options.threads} threads\n"
    )
    results = measure(options)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
