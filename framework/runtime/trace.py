"""Counts the bytes of live tensors while code runs, on real tensors or on fake ones.

Under `FakeTensorMode` nothing is computed and no memory is taken, so a step of a 20B model can be measured on a laptop.
On the CPU, where torch has no allocator to ask, the same counter measures real runs.

What is counted is what the dispatcher sees: storages of tensors that operators return. Memory that a kernel takes and
gives back within one call (cuBLAS workspaces, im2col buffers) isn't seen, nor is what an allocator rounds up or loses
to fragments.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = "activations"
"""Label of every storage that nothing was said about."""


class _Ledger:
    """Live storages of one kind of device.

    Entries are keyed by the storage object, which torch keeps the same for as long as the storage lives.
    """

    def __init__(self) -> None:
        self.current: dict[str, int] = {ACTIVATIONS: 0}
        self.total = 0
        self.peak_total = 0
        self.peak: dict[str, int] = {}
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def add(self, storage: Any, label: str | None = None) -> None:
        key = id(storage)
        known = self._known.get(key)
        if known is not None:
            reference, count, before = known
            grown = storage.nbytes()
            if grown != count or (label is not None and label != before):
                after = before if label is None else label
                self._book(before, -count)
                self._book(after, grown)
                self._known[key] = (reference, grown, after)
            return
        count = storage.nbytes()
        name = label or ACTIVATIONS

        def freed(_: object) -> None:
            self._remove(key)

        reference = weakref.ref(storage, freed)
        self._known[key] = (reference, count, name)
        self._book(name, count)

    def _remove(self, key: int) -> None:
        _, count, label = self._known.pop(key)
        self._book(label, -count)

    def _book(self, label: str, count: int) -> None:
        self.current[label] = self.current.get(label, 0) + count
        self.total += count
        if self.total > self.peak_total:
            self.peak_total = self.total
            self.peak = dict(self.current)

    def restart(self) -> None:
        self.peak_total = self.total
        self.peak = dict(self.current)


class MeasuredBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the context: bytes of live tensors on a device and, beside it, on the host.

    device: its type decides (`cuda`, `cpu`, ...); tensors elsewhere and on `meta` aren't counted. Where it is the CPU,
    `host_…` says the same as the others.
    Tensors that exist before are counted once an operator returns them (a view of a weight, say) or `label` names them;
    so name what rests before measuring. A storage counts once however many tensors share it, until it is freed.
    Cost: about 10 microseconds for each operator that runs.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = torch.device(device).type
        self._ledgers = {kind: _Ledger() for kind in (self._device, "cpu")}

    def label(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors under a name ("weights", "gradients"), from now on until they are freed."""
        for tensor in tensors:
            self._add(tensor, label)

    @property
    def current_bytes(self) -> int:
        """Bytes alive now."""
        return self._ledgers[self._device].total

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once since the beginning or the last `restart`."""
        return self._ledgers[self._device].peak_total

    @property
    def peak_by_label(self) -> dict[str, int]:
        """Label -> bytes at the moment of the peak; their sum is `peak_bytes`."""
        return dict(self._ledgers[self._device].peak)

    @property
    def host_peak_bytes(self) -> int:
        """The same as `peak_bytes` for host memory."""
        return self._ledgers["cpu"].peak_total

    @property
    def host_peak_by_label(self) -> dict[str, int]:
        """The same as `peak_by_label` for host memory."""
        return dict(self._ledgers["cpu"].peak)

    def restart(self) -> None:
        """Forget the peaks; what is alive now is the new one."""
        for ledger in self._ledgers.values():
            ledger.restart()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._add(result)
        elif isinstance(result, tuple | list):
            for part in result:
                if isinstance(part, Tensor):
                    self._add(part)
                elif isinstance(part, tuple | list):
                    for inner in part:
                        if isinstance(inner, Tensor):
                            self._add(inner)
        return result

    def _add(self, tensor: Tensor, label: str | None = None) -> None:
        # A fake tensor's `device` is itself an operator that runs.
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        ledger = self._ledgers.get(device.type)
        if ledger is not None:
            ledger.add(tensor.untyped_storage(), label)
