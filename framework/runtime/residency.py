"""Which components are in memory: loads what a phase of the plan needs and drops what it doesn't."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from framework.plan.types import Phase, VramPlan
from framework.runtime.load import ModuleBuilder, load_component


class Residency:
    """Carries out a plan phase by phase.

    modules: component name -> loaded module, of the current phase and whatever trains.   phase: the current one.
    A component that trains is loaded once and stays, for its weights exist nowhere else.
    """

    def __init__(
        self,
        plan: VramPlan,
        family: ModuleBuilder,
        device: torch.device,
        compute_dtype: torch.dtype,
        seed: int = 0,
        *,
        on_progress: Callable[[str, int], None] | None = None,
    ) -> None:
        """on_progress: called with the component's name and the bytes read since the last call."""
        self.plan = plan
        self.modules: dict[str, nn.Module] = {}
        self.phase: Phase | None = None
        self._family = family
        self._device = device
        self._compute_dtype = compute_dtype
        self._seed = seed
        self._on_progress = on_progress

    def enter(self, phase: Phase) -> None:
        """Make the phase's components be there; frozen ones that it doesn't need are dropped first.

        A dropped module is freed only if nobody else holds it. KeyError if the plan has no such phase.
        """
        needed = self.plan.phase(phase).components
        dropped = [name for name in self.modules if name not in needed and not self._stays(name)]
        for name in dropped:
            del self.modules[name]
        if dropped:
            self._free()
        for name in needed:
            if name not in self.modules:
                self.modules[name] = self._load(name)
        self.phase = phase

    def release(self) -> None:
        """Drop everything, what trains too, and give the device's memory back; for the end of a run."""
        self.modules.clear()
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def _stays(self, name: str) -> bool:
        return self.plan.component(name).trainable != "none"

    def _load(self, name: str) -> nn.Module:
        report = self._on_progress
        return load_component(
            self.plan.component(name),
            self._family,
            device=self._device,
            compute_dtype=self._compute_dtype,
            seed=self._seed,
            on_progress=None if report is None else lambda count: report(name, count),
        )
