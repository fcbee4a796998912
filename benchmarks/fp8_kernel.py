"""One product with a frozen FP8 weight: bf16, decoded first, and decoded inside a Triton kernel.

    python benchmarks/fp8_kernel.py [--device cuda] [--rows 1,32,256,1024,4096] [--width 3072] [--json FILE]

The layers are those of a Qwen-Image block of this width: attention projection, both halves of the MLP, modulation
(which runs on one row). Printed are medians: time of the bf16 product, and the others' times over it, for the forward
product and for the input's gradient; then the row counts for which the fused product was faster than decoding first,
as the line that belongs into `framework/storage/triton_product.py`. The cache is flushed between calls.
Without CUDA the fused column is left out, and the rest shows what decoding costs on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.storage.fp8 import decode_e4m3, encode_e4m3
from framework.storage.triton_product import fused_grad_input, fused_linear, is_available

# Faster by less than this may be chance.
MARGIN = 0.98
CACHE_BYTES = 256 * 1024**2


def layers(width: int) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs) of the linear layers of a block."""
    return {
        "attention": (width, width),
        "mlp in": (4 * width, width),
        "mlp out": (width, 4 * width),
        "modulation": (6 * width, width),
    }


class Product:
    """One layer and one input, by three ways, forward and for the gradient."""

    def __init__(self, outputs: int, inputs: int, rows: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = (torch.randn(outputs, inputs, generator=generator) * 0.02).to(device)
        self.codes, scale = encode_e4m3(weight, "row")
        assert scale is not None
        self.scale = scale
        self.weight = weight.to(torch.bfloat16)
        self.bias = torch.randn(outputs, generator=generator).to(device, torch.bfloat16)
        self.x = torch.randn(rows, inputs, generator=generator).to(device, torch.bfloat16)
        self.grad = torch.randn(rows, outputs, generator=generator).to(device, torch.bfloat16)

    def bf16(self) -> Tensor:
        """The product with a bf16 weight."""
        return functional.linear(self.x, self.weight, self.bias)

    def bf16_grad(self) -> Tensor:
        """Its gradient."""
        return self.grad @ self.weight

    def decoded(self) -> Tensor:
        """Decoded to a bf16 weight first, as the plain path does."""
        y = functional.linear(self.x, decode_e4m3(self.codes, torch.bfloat16))
        return y.mul_(self.scale).add_(self.bias)

    def decoded_grad(self) -> Tensor:
        """Its gradient."""
        return (self.grad * self.scale).to(torch.bfloat16) @ decode_e4m3(self.codes, torch.bfloat16)

    def fused(self) -> Tensor:
        """Decoded inside the kernel."""
        return fused_linear(self.x, self.codes, self.scale, self.bias)

    def fused_grad(self) -> Tensor:
        """Its gradient."""
        return fused_grad_input(self.grad, self.codes, self.scale)


def microseconds(call: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two to warm up (the first of a kernel looks for its fastest tiling)."""
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(1000 * start.elapsed_time(end))
        else:
            began = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - began))
    return median(times)


def measure(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One record for each layer and number of rows."""
    ways = ["bf16", "decoded", *(["fused"] if is_available(device) else [])]
    records = []
    for name, (outputs, inputs) in layers(options.width).items():
        for rows in options.rows:
            product = Product(outputs, inputs, rows, device)
            record: dict[str, Any] = {"layer": name, "shape": [outputs, inputs], "rows": rows}
            for way in ways:
                for suffix in ("", "_grad"):
                    call = getattr(product, way + suffix)
                    record[way + suffix] = microseconds(call, device, options.repeats)
            if "fused" in ways:
                record["error"] = distance(product.fused(), product.decoded())
                record["error_grad"] = distance(product.fused_grad(), product.decoded_grad())
            records.append(record)
            print(line(record), flush=True)
    return records


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.float() - b.float()).norm() / b.float().norm())


COLUMNS = (
    "layer",
    "rows",
    "bf16, µs",
    "decoded first",
    "fused",
    "bf16 gradient, µs",
    "decoded first",
    "fused",
    "fused vs decoded first, rel. L2",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [record["layer"], str(record["rows"])]
    for suffix in ("", "_grad"):
        base = record["bf16" + suffix]
        fused = f"{record['fused' + suffix] / base:.2f}" if "fused" in record else "–"
        cells += [f"{base:.0f}", f"{record['decoded' + suffix] / base:.2f}", fused]
    error = f"{record['error']:.4f}, {record['error_grad']:.4f}" if "error" in record else "–"
    return f"| {' | '.join([*cells, error])} |"


def faster(records: list[dict[str, Any]]) -> list[range]:
    """Stretches of measured row counts at which the fused products of a block take less time than decoding first.

    Modulation layers run on one row, and count there; the others count everywhere else.
    """
    wins = {}
    for rows in sorted({record["rows"] for record in records}):
        these = [r for r in records if r["rows"] == rows]
        these = [r for r in these if (r["layer"] == "modulation") == (rows == 1)] or these
        # A modulation layer's input needs no gradient.
        keys = ("",) if rows == 1 else ("", "_grad")
        fused, decoded = (
            sum(r[way + key] for r in these for key in keys) for way in ("fused", "decoded")
        )
        wins[rows] = fused < MARGIN * decoded
    stretches: list[range] = []
    open_at: int | None = None
    last = 0
    for rows, wins_here in wins.items():
        if wins_here and open_at is None:
            open_at = rows
        if not wins_here and open_at is not None:
            stretches.append(range(open_at, last + 1))
            open_at = None
        last = rows
    return [*stretches, *([range(open_at, last + 1)] if open_at is not None else [])]


def main() -> None:
    """Parse the command line; see the head of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--rows", default=[1, 32, 128, 256, 1024, 4096], **numbers)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(f"{name}, torch {torch.__version__}, width {options.width}\n\n{HEAD}")
    records = measure(options, device)
    if is_available(device):
        stretches = faster(records)
        inside = "".join(f"{stretch!r}, " for stretch in stretches).rstrip()
        print(f"\n_FASTER: {torch.cuda.get_device_capability(device)}: ({inside}),")
    if options.json:
        options.json.write_text(json.dumps({"device": name, "records": records}, indent=2))


if __name__ == "__main__":
    main()
