"""Times the FP8 codec against torch's cast and a plain copy: `python benchmarks/fp8_decode.py [threads]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.plan.types import BLOCK_SHAPE
from framework.storage.fp8 import (
    decode_e4m3,
    dequantise,
    encode_e4m3,
    has_nan_codes,
)
from framework.storage.prepared import Prepared

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


def decode_flushed(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Decode in the processor mode that turns subnormal numbers into zero."""
    torch.set_flush_denormal(True)
    decode_e4m3(codes, out.dtype, out=out)
    torch.set_flush_denormal(False)


def main() -> None:
    """Print one line per way, for a SIZE x SIZE weight in bf16."""
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(SIZE, SIZE)).bfloat16()
    codes, scale = encode_e4m3(weight)
    block_codes, block_scale = encode_e4m3(weight, "block")
    known = Prepared.find(codes, scale)
    known_blocks = Prepared.find(block_codes, block_scale, BLOCK_SHAPE)
    assert known is not None
    assert known_blocks is not None
    reused = torch.empty_like(weight)
    ways: dict[str, Callable[[], object]] = {
        "encode, row scales": lambda: encode_e4m3(weight, "row"),
        "encode, one scale": lambda: encode_e4m3(weight, "tensor"),
        "encode, blocks": lambda: encode_e4m3(weight, "block"),
        "encode, no scale": lambda: encode_e4m3(weight, "none"),
        "decode to bf16": lambda: decode_e4m3(codes, torch.bfloat16),
        "the same, reused memory": lambda: decode_e4m3(codes, torch.bfloat16, out=reused),
        "the same, denormals flushed": lambda: decode_flushed(codes, reused),
        "prepare": lambda: Prepared.find(codes, scale),
        "prepared, row scales": lambda: known.decode(codes, reused),
        "prepared, blocks": lambda: known_blocks.decode(block_codes, reused),
        "decode to float32": lambda: decode_e4m3(codes, torch.float32),
        "dequantise, row scales": lambda: dequantise(codes, scale, torch.bfloat16, out=reused),
        "dequantise, blocks": lambda: dequantise(
            block_codes, block_scale, torch.bfloat16, out=reused
        ),
        "look for NaN codes": lambda: has_nan_codes(codes),
        "torch's cast to bf16": lambda: codes.view(torch.float8_e4m3fn).to(torch.bfloat16),
        "copy of the bf16 weight": lambda: weight.clone(),
        "the same, reused memory ": lambda: reused.copy_(weight),
    }
    print(f"{SIZE} x {SIZE}, {torch.get_num_threads()} threads, median of {ROUNDS}")
    for name, run in ways.items():
        print(f"{name:>28}: {milliseconds(run):7.1f} ms")


if __name__ == "__main__":
    main()
