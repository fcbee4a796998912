"""Times the FP8 codec against torch's cast and a plain copy: `python benchmarks/fp8_decode.py [threads]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.storage.fp8 import decode_e4m3, encode_e4m3

SIZE = 4096
ROUNDS = 15


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of one call."""
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return median(times)


def main() -> None:
    """Print one line per way, for a SIZE x SIZE weight in bf16."""
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(SIZE, SIZE)).bfloat16()
    codes, _ = encode_e4m3(weight)
    ways: dict[str, Callable[[], object]] = {
        "encode, row scales": lambda: encode_e4m3(weight, "row"),
        "encode, no scale": lambda: encode_e4m3(weight, "none"),
        "decode to bf16": lambda: decode_e4m3(codes, torch.bfloat16),
        "decode to float32": lambda: decode_e4m3(codes, torch.float32),
        "torch's cast to bf16": lambda: codes.view(torch.float8_e4m3fn).to(torch.bfloat16),
        "copy of the bf16 weight": lambda: weight.clone(),
    }
    print(f"{SIZE} x {SIZE}, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for name, run in ways.items():
        print(f"{name:>24}: {milliseconds(run):7.1f} ms")


if __name__ == "__main__":
    main()
