"""How much memory the run has taken, for the log and the progress bar, and beside what was predicted for each phase."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from framework.plan.table import format_bytes as binary
from framework.plan.types import Phase, VramPlan

# CUDA's own counter begins anew with each phase; what it said before is kept here.
_highest: dict[torch.device, int] = {}


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: torch's allocations on a GPU, the process's resident set on the CPU."""
    if device.type == "cuda":
        return max(_highest.get(device, 0), torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows has no such counter
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PhasePeaks:
    """Most memory that each phase of a run has held, as `peak_memory_bytes` counts it.

    On a GPU, torch's allocations alone. On the CPU, all of the process with Python and its libraries, and never less
    than in a phase before: the system counts no other way.
    """

    def __init__(self) -> None:
        self.measured: dict[Phase, int] = {}
        self._device: torch.device | None = None

    def watch(self, device: torch.device) -> None:
        """Say which device counts; before that nothing is measured."""
        self._device = device

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What happens inside belongs to a phase, which may come again and again."""
        self.begin()
        try:
            yield
        finally:
            self.end(name)

    def begin(self) -> None:
        """Forget the device's peak so far, but for `peak_memory_bytes`."""
        if self._device is not None and self._device.type == "cuda":
            _highest[self._device] = peak_memory_bytes(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def end(self, name: Phase) -> None:
        """Note the peak since `begin` for a phase."""
        if self._device is None:
            return
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = peak_memory_bytes(self._device)
        self.measured[name] = max(self.measured.get(name, 0), peak)


def compare_peaks(plan: VramPlan, peaks: PhasePeaks) -> dict[str, dict[str, int]]:
    """Phase -> {"predicted_bytes", "measured_bytes"} in the order of the plan; only what was measured.

    predicted: on a GPU of the device, else of device and host together; without activations if the plan isn't traced.
    """
    on_gpu = plan.device.startswith("cuda")
    return {
        phase.name: {
            "predicted_bytes": phase.device_bytes + (0 if on_gpu else phase.host_bytes),
            "measured_bytes": peaks.measured[phase.name],
        }
        for phase in plan.phases
        if phase.name in peaks.measured
    }


def describe_peaks(plan: VramPlan, found: dict[str, dict[str, int]]) -> str:
    """One line for the log: on a GPU prediction beside measurement, elsewhere tensors beside the whole process."""
    if not found:
        return ""
    if plan.device.startswith("cuda"):
        parts = [
            f"{name} predicted {binary(both['predicted_bytes'])}, "
            f"measured {binary(both['measured_bytes'])}"
            for name, both in found.items()
        ]
        return f"peak memory: {'; '.join(parts)}"
    predicted = [f"{name} {binary(both['predicted_bytes'])}" for name, both in found.items()]
    process = binary(max(both["measured_bytes"] for both in found.values()))
    return f"peak memory: tensors predicted {', '.join(predicted)}; whole process {process}"


def format_bytes(count: float) -> str:
    """Write a number of bytes in GiB, or MiB below one GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
