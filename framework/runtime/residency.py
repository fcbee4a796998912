"""Which components are in memory: loads what a phase of the plan needs and lets go of what it doesn't."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from framework.plan.phases import stays_on_host
from framework.plan.types import ComponentPlan, Phase, VramPlan
from framework.runtime.host_memory import give_back
from framework.runtime.load import ModuleBuilder, load_component
from framework.storage.fetching import Fetcher
from framework.storage.scratch import release_scratch

Watch = Callable[[ComponentPlan], AbstractContextManager[Callable[[int], None]]]


class Residency:
    """Carries out a plan phase by phase.

    modules: component name -> loaded module, of the current phase and whatever trains.   phase: the current one.
    watch: may be changed at any time.   fetcher: brings offloaded weights of all components to the device.
    A component that trains is loaded once and stays, for its weights exist nowhere else. A frozen one that rests in
    host memory or on disk, and that a later phase needs again, goes into the state `offload`: nothing of it is on the
    device.
    """

    def __init__(
        self,
        plan: VramPlan,
        family: ModuleBuilder,
        device: torch.device,
        compute_dtype: torch.dtype,
        seed: int = 0,
        *,
        watch: Watch | None = None,
    ) -> None:
        """watch: opened for each component while its weights are read; given the bytes read since the last time."""
        self.plan = plan
        self.modules: dict[str, nn.Module] = {}
        self.phase: Phase | None = None
        self.fetcher = Fetcher(device, limit_bytes=plan.vram_limit_bytes)
        self._offloaded: dict[str, nn.Module] = {}
        self._family = family
        self._device = device
        self._compute_dtype = compute_dtype
        self._seed = seed
        self.watch = watch or unwatched

    def enter(self, phase: Phase) -> None:
        """Make the phase's components be there; frozen ones that it doesn't need are let go first.

        A dropped module is freed only if nobody else holds it. KeyError if the plan has no such phase.
        """
        planned = self.plan.phase(phase)
        dropped = [
            name
            for name in self.modules
            if name not in planned.components and not self._stays(name)
        ]
        for name in dropped:
            module = self.modules.pop(name)
            self.fetcher.release(name)
            if stays_on_host(self.plan, name):
                self._offloaded[name] = module.to("cpu")
        if any(name not in self._offloaded for name in dropped):
            self.fetcher.forget()
        if dropped:
            self._free()
        for name in planned.components:
            if name in self._offloaded:
                self.modules[name] = self._offloaded.pop(name).to(self._device)
            elif name not in self.modules:
                self.modules[name] = self._load(name)
        self.fetcher.keep(planned.kept_bytes)
        self.phase = phase

    def release(self) -> None:
        """Drop everything, what trains too, and give the device's memory back; for the end of a run."""
        self.modules.clear()
        self._offloaded.clear()
        self.fetcher.close()
        release_scratch()
        self._free()

    def _free(self) -> None:
        gc.collect()
        give_back()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def _stays(self, name: str) -> bool:
        return self.plan.component(name).trainable != "none"

    def _load(self, name: str) -> nn.Module:
        part = self.plan.component(name)
        with self.watch(part) as report:
            return load_component(
                part,
                self._family,
                device=self._device,
                compute_dtype=self._compute_dtype,
                seed=self._seed,
                fetcher=self.fetcher,
                on_progress=report,
            )


@contextmanager
def unwatched(part: ComponentPlan) -> Iterator[Callable[[int], None]]:
    """Read weights without telling anybody."""
    yield lambda count: None
