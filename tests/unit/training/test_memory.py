"""Measured peaks beside predicted ones."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from framework.plan.types import MemoryParts, PhasePlan, VramPlan
from framework.training.memory import (
    PhasePeaks,
    compare_peaks,
    describe_peaks,
    peak_memory_bytes,
)

GIB = 2**30


def make_plan(device: str) -> VramPlan:
    def phase(name: Any, gib: int, host: int = 0) -> PhasePlan:
        parts = MemoryParts(weights=gib * GIB, activations=GIB)
        return PhasePlan(
            name=name, components=(), device=parts, host=MemoryParts(weights=host * GIB)
        )

    return VramPlan(
        purpose="train",
        family="qwen_image",
        compute_dtype="bf16",
        device=device,
        components=(),
        phases=(phase("encode", 1), phase("train", 2, 4), phase("sample", 3)),
    )


def test_a_phase_keeps_the_highest_peak_of_all_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5 * GIB, 7 * GIB, 6 * GIB])
    monkeypatch.setattr("framework.training.memory.peak_memory_bytes", lambda device: next(counts))
    peaks = PhasePeaks()
    peaks.watch(torch.device("cpu"))
    with peaks.phase("encode"):
        pass
    for _ in range(2):
        peaks.begin()
        peaks.end("train")
    assert peaks.measured == {"encode": 5 * GIB, "train": 7 * GIB}


def test_nothing_is_measured_before_the_device_is_known() -> None:
    peaks = PhasePeaks()
    with peaks.phase("load"):
        pass
    assert peaks.measured == {}
    assert describe_peaks(make_plan("cpu"), compare_peaks(make_plan("cpu"), peaks)) == ""


def test_the_line_of_a_gpu_has_both_for_each_phase() -> None:
    peaks = PhasePeaks()
    peaks.measured = {"train": int(2.9 * GIB), "encode": 2 * GIB}
    plan = make_plan("cuda:0")
    found = compare_peaks(plan, peaks)
    assert found["train"] == {"predicted_bytes": 3 * GIB, "measured_bytes": int(2.9 * GIB)}
    line = describe_peaks(plan, found)
    assert "encode predicted 2.0 GiB, measured 2.0 GiB; train predicted 3.0 GiB" in line
    assert "sample" not in line


def test_the_line_of_a_cpu_says_what_was_counted() -> None:
    peaks = PhasePeaks()
    peaks.measured = {"encode": 3 * GIB, "train": 9 * GIB}
    plan = make_plan("cpu")
    found = compare_peaks(plan, peaks)
    # Host and device are the same memory there.
    assert found["train"]["predicted_bytes"] == 7 * GIB
    line = describe_peaks(plan, found)
    assert re.search(r"tensors predicted encode 2\.0 GiB, train 7\.0 GiB; whole process 9\.0", line)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_each_phase_by_itself() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    peaks = PhasePeaks()
    peaks.watch(device)
    with peaks.phase("load"):
        large = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
        del large
    with peaks.phase("train"):
        small = torch.empty(2**20, dtype=torch.uint8, device=device)
        del small
    assert peaks.measured["load"] - peaks.measured["train"] >= 62 * 2**20
    assert peak_memory_bytes(device) >= peaks.measured["load"]
